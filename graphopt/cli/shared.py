"""Options that several verbs share, and the checks of what the user typed for them."""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.terminal import Bars
from graphopt.errors import GraphOptError, NoRuntime

if TYPE_CHECKING:
    from graphopt.calibration import Calibration
    from graphopt.graph import Graph
    from graphopt.rewrite.base import Pass

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The .onnx file.", show_default=False)]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the result as JSON; `-` writes it to standard output, and nothing else.",
        show_default=False,
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        "--calib",
        metavar="FILE.npz|DIR|random|self",
        help="Inputs by name: an .npz file, a folder of them, `random`, or a number of random batches; `self` or "
        "`self:32x256` (texts x tokens) for what a language model writes itself.",
        show_default="random; self where a language model is fitted",
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="Size of a symbolic dim, as in seq=128; repeatable."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="For everything random.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and library warnings.")]


def check_input(path: Path) -> Path:
    """Check that a model file is there, before any other work.

    Raises:
        GraphOptError: it is missing or a folder.
    """
    if path.is_dir():
        raise GraphOptError(f"expected an .onnx file, but {path} is a folder; name the file inside it")
    if not path.exists():
        raise GraphOptError(f"expected a model file, but {path} does not exist; check the path")
    return path


def parse_dims(items: Iterable[str] | None) -> dict[str, list[int]]:
    """The sizes given for each dim, in order.

    Raises:
        GraphOptError: an item is no NAME=SIZE.
    """
    found: dict[str, list[int]] = {}
    for item in items or ():
        name, _, size = item.partition("=")
        if not name.strip() or not size.strip().isdecimal() or int(size) < 1:
            raise GraphOptError(f"expected --dim NAME=SIZE with a size of at least 1, got {item!r}; try --dim seq=128")
        found.setdefault(name.strip(), []).append(int(size))
    return found


def single_dims(items: Iterable[str] | None) -> dict[str, int]:
    """One size per dim.

    Raises:
        GraphOptError: an item is no NAME=SIZE, or a dim is given twice.
    """
    dims = parse_dims(items)
    for name, sizes in dims.items():
        if len(sizes) > 1:
            raise GraphOptError(
                f"expected one size for --dim {name}, got {', '.join(map(str, sizes))}; keep one of them"
            )
    return {name: sizes[0] for name, sizes in dims.items()}


def combinations(dims: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Every combination of the given sizes."""
    for sizes in itertools.product(*dims.values()):
        yield dict(zip(dims, sizes, strict=True))


def symbols(graph: Graph) -> list[str]:
    """The names of the symbolic dims of the model's inputs, in order of appearance."""
    named = (d for spec in graph.inputs for d in spec.shape or () if isinstance(d, str))
    return list(dict.fromkeys(named))


def check_dims(graph: Graph, names: Iterable[str]) -> None:
    """Check that the model has these symbolic dims.

    Raises:
        GraphOptError: it lacks one; near names are suggested.
    """
    known = symbols(graph)
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
        raise GraphOptError(f"the model has no symbolic dim {name!r}; {hint}")


def calibration(
    graph: Graph,
    text: str | None,
    seed: int,
    sizes: Mapping[str, int],
    *,
    fitting: bool = False,
    bars: Bars | None = None,
) -> Calibration:
    """The calibration data that `--calib` names.

    Args:
        graph: the model.
        text: what the user typed, None for nothing.
        seed: for everything random.
        sizes: sizes of symbolic dims.
        fitting: see `graphopt.calibration.calibration_for`.
        bars: shows the progress of writing text.

    Raises:
        GraphOptError: it does not exist or does not fit the model.
    """
    from graphopt.calibration import calibration_for

    source: Any = text
    if text is not None and text.isdecimal() and not Path(text).exists():
        source = int(text)
    return calibration_for(graph, source, seed=seed, sizes=sizes, fitting=fitting, track=(bars or Bars(None)).track)


@contextlib.contextmanager
def running_on(graph: Graph, data: Calibration) -> Iterator[None]:
    """Turns a failure to run a model on `data` into a sentence that says what to do about the data.

    Raises:
        NoRuntime: no data would help.
        GraphOptError: the block failed.
    """
    try:
        yield
    except NoRuntime:
        raise
    except Exception as error:  # a kernel may raise anything
        reason, _, rest = str(error).partition("While executing %")
        where = f" at node {rest.split()[0]}" if rest.split() else ""
        sizes = f", or sizes with --dim ({', '.join(symbols(graph))})" if data.synthetic and symbols(graph) else ""
        raise GraphOptError(
            f"expected the model to run on {data.description.partition(':')[0]}, but it fails{where}: "
            f"{reason.strip() or type(error).__name__}; give inputs that fit it with --calib{sizes}"
        ) from error


def check_runs(graph: Graph, data: Calibration, passes: Sequence[Pass]) -> None:
    """Run the model once, before any long work; one that nothing can run is left to passes that need not.

    Raises:
        GraphOptError: it does not run on this data, or nothing can run it and a pass has to.
    """
    import torch

    try:
        with running_on(graph, data), torch.no_grad():
            graph.execute(*data.batches[0])
    except NoRuntime as error:
        judged = [each.name for each in passes if not each.is_proven]
        if judged:
            raise GraphOptError(
                f"expected a model that can be run, as {judged[0]} needs it, but {error}; "
                "only passes that rest on rules, as cleanup does, can rewrite such a model"
            ) from error
