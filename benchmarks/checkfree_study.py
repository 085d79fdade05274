"""What does rebuilding lost stages from their neighbours cost in training? CheckFree and CheckFree+ at toy scale.

The experiments of arXiv 2506.15461 (section 5), and some that it lacks, with all stages of a small byte-level decoder
in one process (`holdfast.trainer.stage_simulation`). Stages are destroyed for good and rebuilt; nothing is modelled.
All methods of one seed begin with the same weights and see the same batches and failures, so that differences are
paired. Numbers are means over seeds ± half the 95 % interval (Student's t), losses in nats per byte of text that is
never trained on. Of 20 intervals one misses its value by chance, and claims are not corrected for their number. A
model this small trained this briefly says how large effects are *here*: what is confirmed or contradicted is so at
this scale, and "not decided" is an answer too. Stages count from 0.

`--quick` takes up to an hour on one core, the default many. With `--results FILE` finished parts are kept there, and an
interrupted study goes on. Plots are written if matplotlib is there (pip install matplotlib); nothing else needs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import checkfree_baselines
import checkfree_claims
import checkfree_damage
import checkfree_healing
import checkfree_remedies
import checkfree_training
import torch
from checkfree_claims import Section, claims_table
from checkfree_runs import EXACT, FULL, QUICK, Memo, Scale, Study, Text, World
from record import write_record
from study import counts

__all__ = ["EXPERIMENTS", "body", "run"]

EXPERIMENTS: Mapping[str, Callable[[Study], Section]] = {
    "fidelity": checkfree_damage.fidelity,
    "instant": checkfree_damage.instant,
    "figure2": checkfree_training.figure_two,
    "rates": checkfree_training.rates,
    "swap": checkfree_training.swap,
    "edges": checkfree_training.edges,
    "rollback": checkfree_baselines.rollback,
    "ablations": checkfree_baselines.ablations,
    "healing": checkfree_healing.healing,
    "gaps": checkfree_healing.gaps,
    "own_copy": checkfree_remedies.own_copy,
    "gain": checkfree_remedies.gain,
    "remedies": checkfree_remedies.remedies,
}


def run(study: Study, names: Sequence[str]) -> dict[str, Section]:
    return {name: EXPERIMENTS[name](study) for name in EXPERIMENTS if name in names}


def body(study: Study, sections: Mapping[str, Section], speed: str) -> str:
    """Of the record: setting, verdicts, experiments."""
    claims = [claim for section in sections.values() for claim in section.claims]
    setting = f"{study.scale}; {len(study.worlds)} seeds. Text: {study.worlds[0].text}. {speed}"
    missing = [name for name in EXPERIMENTS if name not in sections]
    parts = [str(__doc__), f"## Setting\n\n{setting[0].upper()}{setting[1:]}"]
    parts += [f"Not run: {', '.join(missing)}."] if missing else []
    parts += [f"## {section.title}\n\n{section.text}" for section in sections.values()]
    rules = str(checkfree_claims.__doc__).partition("\n\n")[2].strip()
    return "\n\n".join([*parts, f"## Verdicts\n\n{counts(claims)}\n\n{rules}\n\n{claims_table(claims)}"])


def _speed(world: World, steps: int = 40) -> str:
    simulation = world.simulation(EXACT)
    simulation.train_step()
    started_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(steps):
        simulation.train_step()
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    size = sum(parameter.numel() for parameter in simulation.model.parameters())
    rates = f"{60 * steps / cpu_s:,.0f} steps per minute of one core, {60 * steps / wall_s:,.0f} by the clock"
    return f"{size / 1e6:.2f} M parameters; {rates}, beside whatever else ran."


def plot(study: Study, sections: Mapping[str, Section], stem: Path) -> list[Path]:
    """A PNG of mean validation losses for each experiment that has curves; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    made = []
    for name, section in sections.items():
        if not section.curves:
            continue
        figure, axes = plt.subplots(figsize=(8, 5))
        for label, runs in section.curves.items():
            means = torch.tensor(list(runs)).mean(0)
            axes.plot([number * study.scale.every for number in range(len(means))], means, label=label)
        axes.set(title=section.title, xlabel="steps", ylabel="validation loss, nats per byte")
        axes.legend(fontsize="small")
        made.append(stem.with_name(f"{stem.stem}_{name}.png"))
        figure.savefig(made[-1], dpi=110)
        plt.close(figure)
    return made


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an hour at most instead of many")
    parser.add_argument("--only", nargs="*", choices=tuple(EXPERIMENTS), default=tuple(EXPERIMENTS))
    parser.add_argument("--text", type=Path, help="file to train on; default: the interpreter's standard library")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--steps", type=int, help="of a run with failures")
    parser.add_argument("--layers", type=int, default=6, help="a multiple of the six stages")
    parser.add_argument("--results", type=Path, help="file of finished parts: found ones are not made again")
    parser.add_argument("--no-plots", action="store_true")
    return parser.parse_args()


def _scale(options: argparse.Namespace) -> Scale:
    scale = replace(QUICK if options.quick else FULL, layers=options.layers, seeds=options.seeds)
    return replace(scale, steps=options.steps) if options.steps else scale


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    scale, text, memo = _scale(options), Text(options.text), Memo(options.results)
    study = Study([World(scale, text, seed) for seed in range(scale.seeds)], memo)
    speed = _speed(study.worlds[0])
    print(speed, flush=True)
    sections = run(study, options.only)
    found = body(study, sections, speed)
    if memo.reused:
        found += f"\n\n{memo.reused} of the parts were made by earlier calls and read from the file of results."
    theme = re.sub(r"\W", "", f"checkfree_{scale.name}")
    path = write_record(theme, "CheckFree and CheckFree+ in simulation, one thread", found)
    for picture in [] if options.no_plots else plot(study, sections, path):
        print(picture)


if __name__ == "__main__":
    main()
