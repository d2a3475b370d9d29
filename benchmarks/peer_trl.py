"""A step of TRL's GRPOTrainer, the package's own code, for `grpo_step.py --peer trl`.

    python -m pip install trl==1.16.0 torch==2.13.0 transformers==5.24.0
    python benchmarks/grpo_step.py --peer trl

What is TRL's: generation, the reference that it loads from a checkpoint, log-probs, loss. What is
not: a processor and a reward that have been given their results, so no phase contains the reading
of images. Settings are its best here: log-probs at the completions alone, all G rows at once,
beta 0.1 with a reference, no mixed precision, and gradient checkpointing only where asked for.

It takes no video. The prompt's goes in as an image whose grid has the video's temporal slices,
which the model treats alike: tokens, positions, pixels, log-probs and gradients stay the same.

Phases, all of them on methods that GRPOTrainer's training_step calls:

rollout             _generate
reference           _generate_and_score_completions, with the case's completions for _generate's
policy              compute_loss and accelerator.backward

Dimensions: G completions of a prompt, P prompt tokens, C completion tokens, V vocabulary.
"""

from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer import utils

# Without Triton, TRL 1.16 scores all P + C positions, so that shapes never change on devices that
# compile for each. With this line it scores on CPU what it scores on CUDA: the completions alone.
utils._use_triton = lambda device: True


class PreparedPrompt(ProcessorMixin):
    """A processor that answers with the case's prompt, in as many rows as it is asked for."""

    def __init__(self, case):
        words = WordLevel({"<pad>": 0, "<end>": case.V})  # an end that is never sampled
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<end>"
        )
        self.chat_template = None
        image, video = case.V - 1, case.V - 2
        self.ids = case.ids.masked_fill(case.ids == video, image)
        self.is_image = (self.ids == image).long()
        self.patches = case.prompts.patches
        self.grids = self.ids.new_tensor(case.prompts.grids)

    def __call__(self, text, **_):
        rows = len(text)
        return dict(
            input_ids=self.ids.expand(rows, -1),
            mm_token_type_ids=self.is_image.expand(rows, -1),
            pixel_values=self.patches.repeat(rows, 1),
            image_grid_thw=self.grids.repeat(rows, 1),
        )

    def apply_chat_template(self, conversation, tokenize=True, **_):
        if not tokenize:
            return ""
        found = self(conversation)
        lists = ("input_ids", "mm_token_type_ids")
        return found | {name: found[name].tolist() for name in lists}


def make_trainer(hf, case, checkpointing):
    """TRL's trainer for transformers' model, whose reference has the same weights."""
    row = dict(prompt=[dict(role="user", content="")], images=["image"] * len(case.prompts.grids))
    with TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        hf.config._name_or_path = folder  # where it looks for its reference
        trainer = GRPOTrainer(
            model=hf,
            # Rewards that are their advantages already.
            reward_funcs=lambda prompts, **_: case.advantages[0].tolist(),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=case.G,
                gradient_accumulation_steps=1,
                num_generations=case.G,
                max_completion_length=case.C,
                scale_rewards="none",
                loss_type="grpo",
                beta=0.1,
                use_bias_correction_kl=False,
                epsilon=0.2,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                bf16=False,  # on CUDA the weights are bf16 themselves
                gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs=dict(use_reentrant=False),
                use_cpu=case.ids.device.type == "cpu",
                report_to="none",
            ),
            train_dataset=Dataset.from_list([row]),
            processing_class=PreparedPrompt(case),
        )
        # Else the first forward would read them from the file, and they would count as its memory.
        for weight in trainer.ref_model.parameters():
            weight.data = weight.data.clone()
        return trainer


def trl_phases(hf, case, checkpointing):
    """-> functions (rollout, reference, policy), whose last two return log-probs [1, G, C]."""
    G, C = case.G, case.C
    trainer = make_trainer(hf, case, checkpointing)
    trainer.current_gradient_accumulation_steps = 1  # as its train() would
    generate = trainer._generate
    score = trainer._get_per_token_logps_and_entropies
    row = trainer.train_dataset[0]
    prompts = [prepare_multimodal_messages(row["prompt"], row["images"])] * G
    batch = {}  # of the update: what TRL makes of the rollout, the reference's log-probs among it
    last = {}

    def given(prompts):
        """What _generate would return: the case's completions, and no tools, extras or images."""
        texts = [[dict(role="assistant", content="")]] * G
        ids = [trainer.processing_class.ids.tolist()] * G
        return ids, case.completions[0].tolist(), None, texts, None, {}, None, []

    def noted_score(*args, **options):
        found = score(*args, **options)
        last["logp"] = found[0].detach()
        return found

    trainer._generate = given
    trainer._get_per_token_logps_and_entropies = noted_score

    def rollout():
        hf.train()
        _, completions, *_ = generate(prompts)
        lengths = [len(ids) for ids in completions]
        assert lengths == [C] * G, f"TRL wrote {lengths} tokens, not {G} times {C}"

    def reference():
        hf.train()
        batch.clear()
        batch.update(trainer._generate_and_score_completions([row] * G))
        return batch["ref_per_token_logps"][None]

    def policy():
        if not batch:
            raise torch.OutOfMemoryError("the reference's forward had too little memory already")
        hf.train()
        # As `backward` in grpo_step.py. Both models are the same, so are their log-probs.
        old_logp, ref_logp = batch["ref_per_token_logps"] + case.noise[0]
        inputs = batch | dict(old_per_token_logps=old_logp, ref_per_token_logps=ref_logp)
        trainer.accelerator.backward(trainer.compute_loss(hf, inputs))
        return last["logp"][None]

    return rollout, reference, policy
