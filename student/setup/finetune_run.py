"""A network is fine-tuned as a run, and its last weights are scored as any evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from featcache.console.params import require_images
from student import checkpoint
from student.config import as_dict
from student.features import finetuned, results, scores
from student.features.labelled import SetOptions, Sets, open_sets
from student.features.task import Scored
from student.setup import build, eval_options, eval_text, finetune_inputs, finetune_options
from student.setup.console import Console, Told, Voice
from student.setup.finetune_inputs import FinetuneOptions
from student.setup.run_to_end import measure_run, run_to_end
from student.training import accelerator
from student.training.run_folder import commit
from student.training.set_aside import generators_kept
from student.training.train import Run
from student.training.validation import ValidationPlan


def run(name: str, protocol: ModuleType, given: Mapping[str, Any], voice: Voice) -> Told:
    """Fine-tune by a protocol, score and record the result; every process takes part. `given` are
    the options by click's names."""
    eval_options.check_subject(f"eval {name}", given)
    with accelerator.own_state(), accelerator.kernels(deterministic=given["deterministic"]):
        acc = accelerator.accelerator(given["precision"], given["device"])
        console = Console(acc.is_main_process, voice)
        with console.notes_of_one(), generators_kept(acc.device):
            return _run(name, protocol, given, acc, console)


def _run(
    name: str, protocol: ModuleType, given: Mapping[str, Any], acc: Accelerator, console: Console
) -> Told:
    sets = open_sets(
        SetOptions(
            require_images(given["images_spec"]), given["tests"], given["subsets"], given["maps"],
            given["shots"], given["fraction"], given["seed"],
        )
    )  # fmt: skip
    options = FinetuneOptions(**finetune_options.option_values(given))
    begun = finetune_inputs.begin(options)
    config = finetune_inputs.configure(options, begun, protocol, len(sets.names))
    if given["show"]:
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in as_dict(config).items())
        return Told(as_dict(config), text, console.speaks)
    for note in [*([begun.note] if begun.note else ()), *(f"note: {each}" for each in sets.notes)]:
        console.say(note)
    started = time.perf_counter()
    crop_pct = options.crop_pct or protocol.crop_pct(config.img_size)
    job, loader = finetune_inputs.build(options, begun, config, sets, acc, crop_pct)
    for note in [*build.rate_notes(job, loader), *finetune_inputs.mix_notes(config, loader)]:
        console.say(note)
    if given["dry_run"]:
        return measure_run(job, loader, acc, console)
    run_to_end(job, loader, acc, console)
    facts = {
        "eval": name,
        "of": str(options.run.absolute() if options.run else options.teacher_spec),
        **({"recipe": begun.recipe} if begun.recipe else {}),
        **({"checkpoint": begun.about["checkpoint"]} if options.run else {}),
        **({"ema": True} if begun.about.get("ema") else {}),
        **_result(job, acc, sets, options),
        "settings": _settings(given, sets, job),
        "seconds": round(time.perf_counter() - started, 2),
        "commit": commit(),
    }
    if console.speaks:
        results.record(options.run, facts, None, also=job.out)
    return Told(facts, _text(name, facts), console.speaks)


def _result(job: Run, acc: Accelerator, sets: Sets, options: FinetuneOptions) -> dict[str, Any]:
    """Score what the run left on disk: the last weights, and their average; every process takes
    part."""
    acc.wait_for_everyone()  # the first process writes the last checkpoint
    network, _ = finetuned.load_classifier(job.out)
    scored = _scored(job, network, acc)
    tests = {each.of.name: scores.of_test(each) for each in scored}
    facts: dict[str, Any] = {
        **next(iter(tests.values())),
        "n_train": len(sets.train),
        "classes": len(sets.names),
        "finetuned": str(job.out.absolute()),
        "step": checkpoint.latest_step(job.out),
        "tests": tests,
    }
    if (best := finetuned.best_facts(job.out)) is not None:
        facts["best"] = {"step": best.step, "top1": best.top1}
    if options.keep_ema is not None:
        average, _ = checkpoint.load_encoder(job.out, ema=True)
        found = _scored(job, average, acc)
        facts["average"] = {each.of.name: scores.of_test(each)["top1"] for each in found}
    plan = job.watch
    assert isinstance(plan, ValidationPlan)
    if plan.skipped.count:
        facts["skipped"] = plan.skipped.told()
    if sets.passed_over:
        facts["passed_over"] = sets.passed_over
    return facts


def _scored(job: Run, network: nn.Module, acc: Accelerator) -> list[Scored]:
    assert isinstance(job.watch, ValidationPlan)
    network.to(acc.device)

    def logits(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": network(batch["images"])}

    with torch.no_grad(), acc.autocast():
        return job.watch.score(logits, acc)


def _settings(given: Mapping[str, Any], sets: Sets, job: Run) -> dict[str, Any]:
    """Return what the result depends on, as plain JSON."""
    names = ("seed", "shots", "fraction", "crop_pct", "epochs", "batch_size", "accumulate")
    shared = {key: given[key] for key in names if given[key] is not None}
    named = {"weights": "weights", "subsets": "subset", "maps": "class_map"}
    shared |= {told: given[key] for key, told in named.items() if given[key]}
    return {
        **shared,
        "images": given["images_spec"],
        "tests": {test.name: test.source.spec for test in sets.tests},
        **as_dict(job.config),
    }


def _text(name: str, facts: dict[str, Any]) -> str:
    lines = [eval_text.of_result(name, facts)]
    if "best" in facts:
        best = facts["best"]
        lines.append(
            f"best of all epochs, chosen on the test pictures: {best['top1']:.2f} % at step "
            f"{best['step']}"
        )
    lines += [
        f"average of the weights{' on ' + test if len(facts['average']) > 1 else ''}: {top1:.2f} %"
        for test, top1 in facts.get("average", {}).items()
    ]
    return "\n".join([*lines, f"fine-tuned: {facts['finetuned']}"])
