"""Tries what people do with a loaded model of every method at tp=1, with the tools that are installed.

    python benchmarks/tools.py [MODEL] [--only nf4 hqq ...] [--out FILE]

MODEL is a folder of a bf16 model that has a tokenizer; default: the small one in this repository. A run on CPUs: GPUs
are hidden. Every method has a fresh process, every tool a freshly loaded model. A cell says

- `yes`: the tool did it, and what came out was checked (losses fall, pieces are the
  whole text, logits are equal once loaded again);
- `refused`: distquant's error of one line, which says what to do instead;
- `-`: the tool is not installed, or the tool's own code for the method (gptqmodel, optimum, a GPU);
- anything else: an error, which is a defect and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from common import ROOT, fresh, table, write

TEXT = ["In the beginning God created the heaven and the earth.", "And the earth was without form, and void."] * 4
TARGETS = ["q_proj", "v_proj", "down_proj"]
LOGITS = 0.1
"""Logits of a model that was saved and loaded again differ by at most this part: some tools round activations."""


def generation(model: Any, tokenizer: Any) -> None:
    from transformers import pipeline

    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = made(TEXT[0], max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith(TEXT[0])


def streamer(model: Any, tokenizer: Any) -> None:
    import threading

    from transformers import TextIteratorStreamer

    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = {**tokenizer(TEXT[0], return_tensors="pt"), "max_new_tokens": 8, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": pieces})
    thread.start()
    text = "".join(pieces)
    thread.join()
    whole = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(whole)


def evaluation(model: Any, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    asked = [Instance("loglikelihood", {}, (TEXT[0], " and"), index) for index in range(2)]
    (first, _), (second, _) = judge.loglikelihood(asked)
    assert first == second < 0


def adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))


def samples(tokenizer: Any) -> list[dict[str, list[int]]]:
    found = [tokenizer(text).input_ids[:8] for text in TEXT]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in found]


def training(kind: Any, folder: str) -> Any:
    return kind(
        output_dir=folder, per_device_train_batch_size=2, max_steps=3, logging_steps=1, learning_rate=5e-2,
        lr_scheduler_type="constant", optim="sgd", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip


def check_losses(trainer: Any) -> None:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and min(losses[1:]) < losses[0], losses


def trainer(model: Any, tokenizer: Any) -> None:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        data: Any = [sample for sample in samples(tokenizer)[:1] for _ in range(8)]
        check_losses(Trainer(model=adapters(model), args=training(TrainingArguments, folder), train_dataset=data))


def sft(model: Any, tokenizer: Any) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.from_dict({"text": TEXT[:1] * 8})
        options: Any = {"processing_class": tokenizer, "peft_config": LoraConfig(r=4, target_modules=TARGETS)}
        arguments = training(SFTConfig, folder)
        arguments.bf16 = False
        check_losses(SFTTrainer(model=model, args=arguments, train_dataset=data, **options))


def steps(model: Any, optimizer: Any, tokenizer: Any, backward: Callable[[Any], Any], step: Callable[[], Any]) -> None:
    ids = tokenizer(TEXT[0], return_tensors="pt").input_ids
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        step()
        if optimizer is not None:
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0], losses


def accelerate(model: Any, tokenizer: Any) -> None:
    import torch
    from accelerate import Accelerator

    accelerator, peft = Accelerator(cpu=True), adapters(model)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], 0.05)
    peft, optimizer = accelerator.prepare(peft, optimizer)
    steps(peft, optimizer, tokenizer, accelerator.backward, optimizer.step)


def deepspeed(model: Any, tokenizer: Any) -> None:
    import socket

    import deepspeed
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    peft = adapters(model)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], 0.05)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=peft, optimizer=optimizer, config={**config, "bf16": {"enabled": True}})
    steps(engine, None, tokenizer, engine.backward, engine.step)


def saving(model: Any, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = tokenizer(TEXT[0], return_tensors="pt").input_ids
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=model.dtype)
    assert not any(found.values()), found
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), again(ids).logits.float()
    assert (ours - theirs).abs().max() / ours.abs().max() < LOGITS, "logits differ"


TOOLS: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "pipeline": ("transformers", generation),
    "streamer": ("transformers", streamer),
    "lm_eval": ("lm_eval", evaluation),
    "Trainer": ("transformers", trainer),
    "TRL (SFT)": ("trl", sft),
    "accelerate": ("accelerate", accelerate),
    "save, `from_pretrained`": ("transformers", saving),
    "DeepSpeed ZeRO-2": ("deepspeed", deepspeed),
}
"""Name of a column -> the package that it needs, and what it does with a model and its tokenizer. DeepSpeed leaves a
process group behind, and so is last."""


def attempts(path: str, method: str, tools: list[str]) -> list[str]:
    """Returns the cells of a method, one for each tool."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    return [attempt(path, method, tool) for tool in tools]


def attempt(path: str, method: str, tool: str) -> str:
    """Returns the cell of a method and a tool."""
    import distquant as dq
    from distquant.runtime.answer import tokenizer_of

    try:
        model = dq.load(path, quantization_config=method)
        TOOLS[tool][1](model, tokenizer_of(model))
    except dq.InputError:
        return "refused"
    except ImportError as error:
        print(f"{method}, {tool}: {str(error).splitlines()[0]}", file=sys.stderr)
        return "-"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:80]}".replace("|", "/").replace("\n", " ")
    return "yes"


def methods(path: str, only: list[str] | None) -> list[str]:
    """Returns the methods that can be planned here, one short name for each way to store and to multiply."""
    import distquant as dq
    from distquant.quantization.registry import config_classes

    able = []
    for name in [name for kind in config_classes() for name in kind.short_names]:
        if (only and name not in only) or (not only and "-g" in name):
            continue
        try:
            dq.plan(path, quantization_config=name)
            able.append(name)
        except dq.InputError as error:
            print(f"{name}: {error.problems[0]}", file=sys.stderr)
    return able


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "models" / "kjv-tiny"))
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    there = [tool for tool, (package, _) in TOOLS.items() if importlib.util.find_spec(package) is not None]
    rows, good = [], True
    for method in methods(arguments.model, arguments.only):
        found = dict(zip(there, fresh(attempts, arguments.model, method, there), strict=True))
        row = [found.get(tool, "-") for tool in TOOLS]
        good = good and set(row) <= {"yes", "refused", "-"}
        rows.append([f"`{method}`", *row])
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    write(table(["method", *TOOLS], rows), "tools", arguments.out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
