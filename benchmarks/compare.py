"""Quality for the price: RandLoRA beside LoRA, the head alone and full fine-tuning.

    make compare                      some six hours on two cores; prints tables, writes
                                      out/compare/; goes on where it was stopped
    python benchmarks/compare.py chat    one task of three: R8, R52, chat

What each training reached is kept in benchmarks/compared/, with what it cost and at which commit;
remove a file to have its method trained again.

Three tasks: Reuters R8 and R52 with MiniLM-L6 under a new head, R8 asked in chat of SmolLM2. Every
method gets its own learning rates: accuracy on held-back documents, after a run with one seed (a
shorter one, for MiniLM), climbed until no neighbour is better. Then three seeds (head, order,
adapter) train until the loss is flat and are tested on test documents. Each core takes a method.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import compare_llm
import compare_news
import drawings
import jax
import measured
import transformers
from trials import Result, Trial, climb

OUT = Path("out/compare")
KEPT = Path(__file__).parent / "compared"
TASKS = {
    "R8": compare_news.News(8),
    "R52": compare_news.News(52),
    "chat": compare_llm.Chat(),
}
LIKE = {"R52": "R8"}  # a search begins where that of a task like it ended
SEEDS = (0, 1, 2)
Job = tuple[str, str]  # task, method


class Kept:
    """The results of one method on one task, in a file; what is not there is run."""

    def __init__(self, job: Job) -> None:
        name, method = job
        self.job, self.task = job, TASKS[name]
        self.method = self.task.methods[method]
        self.path = KEPT / f"{name} {method}.json".replace("/", "over")
        self.found = json.loads(self.path.read_text()) if self.path.exists() else {}

    def result(self, trial: Trial) -> Result:
        """What a trial reaches."""
        key = str(trial)
        if key not in self.found:
            began = time.process_time()  # whatever else runs beside it
            result = self.task.run(self.method, trial)
            cost = {
                "minutes": round((time.process_time() - began) / 60, 1),
                "commit": measured.commit(),
            }
            self.found[key] = {**asdict(result), **cost}
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")
            print(f"{': '.join(self.job)}, {key}: {result.accuracy:.4f}", flush=True)
        names = [field.name for field in fields(Result)]
        return Result(**{name: self.found[key][name] for name in names})

    @property
    def minutes(self) -> float:
        """What all trials cost, on one core."""
        return sum(one["minutes"] for one in self.found.values())

    def best(self) -> Trial:
        """The learning rates that the search ends with."""
        name, method = self.job
        if name in LIKE:
            begin = Kept((LIKE[name], method)).best()
        else:
            begin = Trial(self.method.rate, self.method.head_rate)
        return climb(lambda trial: self.result(trial).accuracy, begin)


def outcome(job: Job) -> dict[str, Any]:
    """The row of one method on one task, whose rates `search` has found."""
    kept = Kept(job)
    best = kept.best()
    tested = [kept.result(replace(best, seed=seed, held=False)) for seed in SEEDS]
    found = [one.accuracy for one in tested]
    return {
        "rate": best.rate,
        "head_rate": best.head_rate,
        "mean": statistics.mean(found),
        "spread": statistics.stdev(found),
        "trained": tested[0].trained,
        "losses": tested[0].losses,
        "minutes": kept.minutes,
    }


def search(job: Job) -> str:
    """Finds the learning rates of one method on one task."""
    return f"{': '.join(job)}: {Kept(job).best()}"


def one_core(free: Any) -> None:
    """Keeps this process, and so the threads that XLA makes in it, to a core of its own; quiet."""
    os.sched_setaffinity(0, {free.get()})
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    # seeds differ in their arrays alone
    jax.config.update("jax_compilation_cache_dir", str(OUT / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)


def main() -> None:
    """Every run that is not there yet, then the tables and the picture."""
    if unknown := set(sys.argv[1:]) - set(TASKS):
        raise SystemExit(f"{', '.join(sorted(unknown))}: expected some of {', '.join(TASKS)}")
    for folder in (OUT, KEPT):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: task for name, task in TASKS.items() if name in (sys.argv[1:] or TASKS)}
    jobs = [(name, method) for name, task in chosen.items() for method in task.methods]
    spawn = multiprocessing.get_context("spawn")
    free, cores = spawn.Queue(), sorted(os.sched_getaffinity(0))
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(len(cores), spawn, one_core, (free,)) as pool:
        for found in pool.map(search, jobs):
            print(found, flush=True)
        rows = dict(zip(jobs, pool.map(outcome, jobs), strict=True))
    for name, task in chosen.items():
        print(f"\n{task.title}: test accuracy, mean and standard deviation of three seeds\n")
        print(
            "| method | trained numbers | rate | head's rate | last two tenths' loss | accuracy "
            "| minutes of a core, search and all |"
        )
        print("|---|---|---|---|---|---|---|")
        for method in task.methods:
            print(line(method, rows[name, method]))
    measured.keep(OUT / "compare.json", "make compare", numbers(chosen, rows))
    measured.draw(drawings.compare, OUT / "compare.json", OUT / "compare.png")


def line(method: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    head = "" if row["head_rate"] is None else f"{row['head_rate']:g}"
    before, last = row["losses"][-2:]
    return (
        f"| {method} | {row['trained']:,} | {row['rate']:g} | {head} | {before:.3f}, {last:.3f} "
        f"| {row['mean']:.4f} ± {row['spread']:.4f} | {row['minutes']:.0f} |"
    )


def numbers(tasks: dict[str, Any], rows: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """What is drawn of them."""
    drawn = ("trained", "mean", "spread")
    return {
        task.title: {m: {key: rows[name, m][key] for key in drawn} for m in task.methods}
        for name, task in tasks.items()
    }


if __name__ == "__main__":
    main()
