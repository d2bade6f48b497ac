"""Train the three demo adapters of `examples/adapters/` on the answers in `styles.json`.

    python examples/train_adapters.py [--model FOLDER] [--out FOLDER] [name …]

It needs the extras `worker` and `demo`, and takes a few minutes per adapter on two CPU cores. On one machine the result
is always the same. The adapters differ in rank and in the modules they change, so together they make a mixed batch.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lorafleet.quickstart import HUB_MODEL_ID, fetch_quickstart_model

HERE = Path(__file__).parent
IGNORED = -100  # label of a token that the loss ignores
HELD_OUT = ("What is the capital of France?", "Why is the sky blue?", "How do I bake bread?", "Who are you?")


@dataclass(frozen=True, slots=True)
class Style:
    """Training parameters of one demo adapter."""

    rank: int
    target_modules: tuple[str, ...]
    num_epochs: int
    learning_rate: float


STYLES = {
    "pirate": Style(rank=4, target_modules=("q_proj", "v_proj"), num_epochs=8, learning_rate=3e-3),
    "json": Style(rank=2, target_modules=("gate_proj", "up_proj", "down_proj"), num_epochs=12, learning_rate=2e-3),
    "haiku": Style(rank=3, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), num_epochs=8, learning_rate=3e-3),
}
BATCH_SIZE = 8


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of one exchange, and its labels: only the answer and its end have labels."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt).input_ids
    answer_ids = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


def collate(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Pad exchanges on the right. Return int64 tensors [batch, longest]."""
    longest = max(len(ids) for ids, _ in examples)
    batch = {name: torch.zeros(len(examples), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(examples), longest), IGNORED)
    for row, (ids, labels) in enumerate(examples):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = torch.tensor(labels)
    return batch


def train(model_folder: Path, name: str, out: Path) -> None:
    """Train the adapter `name` and write it to `out`/`name`; print its answers to held-out questions."""
    torch.manual_seed(0)
    style = STYLES[name]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=style.rank,
        lora_alpha=2 * style.rank,
        target_modules=list(style.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    pairs = json.loads((HERE / "styles.json").read_text())[name]
    examples = [encode(tokenizer, pair["question"], pair["answer"]) for pair in pairs]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=style.learning_rate, weight_decay=0.0)
    num_steps = style.num_epochs * -(-len(examples) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, style.learning_rate, num_steps, pct_start=0.1)
    model.train()
    loss = torch.tensor(float("nan"))
    for _ in track(range(style.num_epochs), description=f"{name:8}"):
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), BATCH_SIZE):
            loss = model(**collate([examples[i] for i in order[start : start + BATCH_SIZE]])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    print(f"{name}: loss {loss.item():.3f}")
    save(model, out / name)
    model.eval()
    for question in HELD_OUT:
        print(f"  {question}\n    " + answer(model, tokenizer, question).replace("\n", "\n    "))


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's format, with float16 weights and a base name that any machine can resolve."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        weights = load_file(Path(scratch) / "adapter_model.safetensors")
        config = json.loads((Path(scratch) / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = HUB_MODEL_ID
    config["target_modules"] = sorted(config["target_modules"])  # PEFT has a set, whose order varies from run to run
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    halves = {name: weight.half().contiguous() for name, weight in weights.items()}
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str, max_new_tokens: int = 80) -> str:
    """Return the greedy answer to one question."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Train the adapters that the command line names."""
    parser = argparse.ArgumentParser(description="Train the demo adapters.")
    parser.add_argument("names", nargs="*", default=list(STYLES), help="adapters to train (default: all)")
    parser.add_argument("--model", type=Path, help="folder of the base model (default: fetch it)")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    model_folder = args.model or fetch_quickstart_model(Path.home() / ".cache" / "lorafleet")
    for name in args.names:
        train(model_folder, name, args.out)


if __name__ == "__main__":
    main()
