"""Frames that say which they are, whatever their size and however they are turned.

A frame is a grid of 4 x 6 blocks. The first row has six colours, which tell how it is turned; the
second and third have the 12 bits of its number, white for 1, the highest first; the last row has
the second's bits inverted.
"""

import numpy as np

COLOURS = ["red", "green", "blue", "white", "black", "grey"]
RGB = dict(
    red=(255, 0, 0),
    green=(0, 255, 0),
    blue=(0, 0, 255),
    white=(255, 255, 255),
    black=(0, 0, 0),
    grey=(128, 128, 128),
)


def frame(number, width, height):
    """-> uint8 [height, width, 3]"""
    blocks = np.zeros((4, 6, 3), np.uint8)
    blocks[0] = [RGB[name] for name in COLOURS]
    bits = [int(bit) for bit in f"{number:012b}"]
    blocks[1:3] = 255 * np.array(bits).reshape(2, 6, 1)
    blocks[3] = 255 - blocks[1]

    rows = np.arange(height) * 4 // height
    columns = np.arange(width) * 6 // width
    return blocks[rows][:, columns]


def read(picture):
    """uint8 [height, width, 3] -> (number, turns): quarter turns against the clock that set it
    upright. (None, None) if it is no whole numbered frame."""
    for turns in range(4):
        blocks = middles(np.rot90(picture, turns))
        red, green, blue = blocks[0, :3]
        if min(red[0] - red[1], green[1] - green[0], blue[2] - blue[0]) < 50:
            continue

        light = blocks.mean(-1)
        bits = light[1:3].ravel()
        clean = not ((bits > 60) & (bits < 195)).any()
        white = bits > 127
        inverse = light[3] > 127
        if clean and (inverse != white[:6]).all():
            return int("".join("01"[bit] for bit in white.astype(int)), 2), turns
    return None, None


def middles(picture):
    """-> [4, 6, 3]: the mean colour of each block's middle."""
    height, width = picture.shape[:2]
    blocks = np.zeros((4, 6, 3))
    for row in range(4):
        for column in range(6):
            top = int(height * (row + 0.35) / 4)
            left = int(width * (column + 0.35) / 6)
            bottom = max(int(height * (row + 0.65) / 4), top + 1)
            right = max(int(width * (column + 0.65) / 6), left + 1)
            part = picture[top:bottom, left:right]
            blocks[row, column] = part.reshape(-1, 3).mean(0)
    return blocks
