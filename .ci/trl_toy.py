"""A tiny Qwen2 of random weights on commute, trained by TRL itself or by the README's trainer.

python trl_toy.py OUT      six steps by each of five trainers; the trained parameters go to OUT
"""

import os
import random
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_trainer import TokenTransformTrainer  # test_trl.py takes it out of the README

from toy_tasks import EOS, TASKS, VOCAB, decode, encode


class Fixed:
    """Mixed into a trainer: completions that depend on neither model nor number of processes.

    Those of a group share their first two tokens. Rows from 20 on are short, so that two processes
    hold tensors of different lengths.
    """

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        completions = []
        for row, ids in enumerate(prompt_ids, start=first):
            prompt = decode(ids)
            rng = random.Random(f"{self.state.global_step} {row}")
            text = prompt[0] + "+" + TASKS["commute"].demonstration(prompt, rng)[2:]
            completions.append(encode(text[:4] if row >= 20 else text) + [EOS])
        return completions, None


class FixedTheirs(Fixed, GRPOTrainer):
    pass


class FixedOurs(Fixed, TokenTransformTrainer):
    pass


def character_tokenizer():
    """One token per character of VOCAB."""
    ids = {letter: i for i, letter in enumerate(VOCAB)}
    letters = Tokenizer(models.WordLevel(ids, unk_token="_"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="_", eos_token=".", unk_token="_"
    )


def tiny_model():
    """One layer of width 32, in float64."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen2Config(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).double()


SETTINGS = {
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "num_iterations": 3,
    "steps_per_generation": 1,
    "max_completion_length": 8,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "seed": 0,
    "max_grad_norm": 1e9,
    "loss_type": "grpo",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "ddp_find_unused_parameters": False,
    "report_to": "none",
    "save_strategy": "no",
}


def toy_trainer(trainer=TokenTransformTrainer, ours=None, scale=1.0, offset=0.0, **settings):
    """TRL's own trainer, or one of the README's with `ours`: loss, transform, at."""

    def reward(prompts, completion_ids, **kwargs):
        """Anything that differs within a group."""
        return [scale * (sum(ids) % 3 == 0) + offset for ids in completion_ids]

    return trainer(
        tiny_model(),
        reward,
        GRPOConfig(output_dir=tempfile.mkdtemp(), **(SETTINGS | settings)),
        processing_class=character_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": TASKS["commute"].prompts()}),
        **(ours or {}),
    )


def trained(trainer, ours, level):
    """Parameters after six steps on five groups, of which one lies on both of two processes."""
    trainer = toy_trainer(
        trainer,
        ours,
        importance_sampling_level=level,
        per_device_train_batch_size=40 // int(os.environ.get("WORLD_SIZE", "1")),
        optim="sgd",
        learning_rate=0.1,
        epsilon=0.1,
    )
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


if __name__ == "__main__":
    runs = {"min": trained(FixedOurs, {"transform": "min", "at": "shared"}, "sequence")}
    for loss, level in (("gspo", "sequence"), ("grpo", "token")):
        runs[f"{loss}, TRL"] = trained(FixedTheirs, {}, level)
        runs[f"{loss}, off"] = trained(FixedOurs, {"loss": loss, "transform": "off"}, level)
    if os.environ.get("RANK", "0") == "0":
        torch.save(runs, sys.argv[1])
    os._exit(0)  # gloo's threads now and then abort a plain exit, after all is saved
