"""Train the decoder on the sources of Python's standard library; an interrupted run continues where it was.

python samples/tiny_decoder/train.py --out FOLDER --minutes 75
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_decoder import data
from tiny_decoder.checkpoint import save
from tiny_decoder.model import AttentionFunction, Config, Decoder, softmax_attention
from tiny_decoder.softplus import SoftplusAttention

ATTENTION: dict[str, AttentionFunction] = {
    "softmax": softmax_attention,
    "lssa": SoftplusAttention(),
    "lssar3": SoftplusAttention(power=3),
    "lssar15": SoftplusAttention(power=15),
}
TOKENS = 2048  # of one step
SHORT = 256  # the length of most windows
LONG_FROM = 0.75  # of the budget; from here on windows fill the context
WARM_UP = 0.02
PEAK, FLOOR = 1.5e-3, 5e-5  # learning rates
VALIDATION_TOKENS = 32 * 1024


class Training:
    """Model, optimizer, and how far they are: everything that a checkpoint keeps."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.arguments = arguments
        attend = ATTENTION[arguments.attention]
        self.model = Decoder(Config(), torch.compile(attend, dynamic=False) if arguments.compile else attend)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds, self.length, self.best = 0, 0.0, SHORT, math.inf
        self.path: Path = arguments.out / "checkpoint.pt"

    @property
    def done(self) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        if self.arguments.steps is not None:
            return min(1.0, self.step / self.arguments.steps)
        return min(1.0, self.seconds / (60 * self.arguments.minutes))

    def resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.length, self.best = state["progress"]

    def write(self) -> None:
        """Replace the checkpoint, in one move: an interruption leaves the one before."""
        progress = (self.step, self.seconds, self.length, self.best)
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": progress,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def advance(self, text: Tensor) -> float:
        """One step; its loss in nats per byte."""
        started = time.perf_counter()
        if self.done >= LONG_FROM and self.length == SHORT:
            # Losses at the two lengths do not compare.
            self.length, self.best = self.model.config.context, math.inf
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done)
        self.model.train()
        windows = data.batch(text, self.length, TOKENS // self.length, self.arguments.seed, self.step)
        loss = self._loss(windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return loss.item()

    @torch.no_grad()
    def validate(self, text: Tensor) -> float:
        """Loss on fixed windows; the weights are written where it is the lowest so far."""
        started = time.perf_counter()
        self.model.eval()
        windows = data.windows(text, self.length, VALIDATION_TOKENS // self.length).split(TOKENS // self.length)
        loss = sum(self._loss(window).item() for window in windows) / len(windows)
        if loss < self.best:
            self.best = loss
            save(self.model, self.arguments.out)
        self.seconds += time.perf_counter() - started
        return loss

    def _loss(self, windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.bf16):
            logits = self.model(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def learning_rate(done: float) -> float:
    """Linear warm-up, then a cosine from PEAK to FLOOR, by the share of the budget that is spent."""
    if done < WARM_UP:
        return PEAK * max(done / WARM_UP, 0.01)
    angle = math.pi * (done - WARM_UP) / (1 - WARM_UP)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(angle)) / 2


def main() -> None:
    """Read the arguments, and train until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the weights")
    parser.add_argument("--minutes", type=float, default=75, help="of training, interruptions not counted")
    parser.add_argument("--steps", type=int, help="a budget in steps in place of minutes: the same on any machine")
    parser.add_argument("--save-every", type=float, default=3, help="minutes between checkpoints")
    parser.add_argument("--attention", choices=sorted(ATTENTION), default="softmax")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the attention")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="autocast to bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)

    training = Training(arguments)
    if training.path.exists():
        training.resume()
    run(training, Console())


def run(training: Training, console: Console) -> None:
    """Train until the budget is spent, with a bar and a line at each checkpoint."""
    text, held_out = data.texts()
    console.print(f"{len(text):,} bytes to train on, {len(held_out):,} held out; from step {training.step}")
    columns = (BarColumn(), "{task.percentage:.1f}%", TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), "left")
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=1.0, completed=training.done, loss="")
        average, saved = math.nan, training.seconds
        while training.done < 1:
            loss = training.advance(text)
            average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
            progress.update(task, completed=training.done, loss=f"step {training.step}, loss {average:.3f}")
            if training.seconds - saved < 60 * training.arguments.save_every and training.done < 1:
                continue
            validation = training.validate(held_out)
            training.write()
            saved = training.seconds
            console.print(
                f"{training.seconds / 60:.1f} min, step {training.step}, {training.step * TOKENS:,} tokens: training "
                f"loss {average:.4f}, validation loss {validation:.4f} at length {training.length}",
                soft_wrap=True,
            )


if __name__ == "__main__":
    main()
