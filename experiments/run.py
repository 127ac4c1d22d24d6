"""The one entry to run experiments: ``python -m experiments.run experiment=dynapipe/fig13 scale=tiny``.

Hydra composes plain YAML from ``conf/``; an experiment's settings are, later wins: the defaults of its
``Config``, ``settings`` of its YAML, ``scales.<scale>`` of its YAML, and ``settings.NAME=VALUE`` from the command
line.
Results go to ``<output_dir>/<paper>/<figure>/<scale>/``; a sweep over anything else adds a directory named
after its values.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
import pandas as pd
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import catalog, environment, record, settings
from llmsys.core.config import to_plain
from llmsys.core.errors import LlmsysError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONF = environment.REPOSITORY / "conf"
INTERRUPTED = 130  # the shell's exit code for Ctrl-C
SETUP_ERRORS = (HydraException, OmegaConfBaseException)

OmegaConf.register_new_resolver("list_experiments", lambda: "\n  ".join(catalog.names()), replace=True)
OmegaConf.register_new_resolver("checked_output_dir", settings.checked_output_dir, replace=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run made. ``directory`` is where it was saved, or None."""

    rows: pd.DataFrame
    manifest: dict[str, Any]
    figure: Figure
    comparisons: tuple[record.Comparison, ...]
    directory: Path | None

    def _repr_png_(self) -> bytes:
        """Lets a notebook show the figure of a result."""
        return record.image(self.figure, "png")


def run_experiment(name: str, scale: str = "tiny", overrides: Sequence[str] = (), *, save: bool = False) -> Result:
    """Run one experiment from Python, for example in a notebook.

    ``overrides`` are those of the command line, as ``["seed=1", "settings.max_iterations=3"]``. With ``save``
    the result is also written below ``output_dir``. Can be called any number of times, also inside another
    Hydra program.
    Raises LlmsysError for anything wrong with the experiment, the settings or the data.
    """
    catalog.load(name)
    return execute(name, compose(name, scale, overrides), save=save)


def compose(name: str, scale: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that the command line would give for these words."""
    words = settings.prepare_overrides([f"scale={scale}", *overrides, f"experiment={name}"])
    with _own_hydra(), hydra.initialize_config_dir(str(CONF), job_name="llmsys", version_base="1.3"):
        try:
            return hydra.compose("config", overrides=words)
        except SETUP_ERRORS as error:
            raise settings.composition_error(error) from error


@contextmanager
def _own_hydra() -> Iterator[None]:
    # Hydra keeps one global state; ours must not clash with that of a program or notebook around us.
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def execute(name: str, cfg: DictConfig, *, variant: str = "", save: bool = True) -> Result:
    """Run experiment ``name`` with a composed configuration; ``variant`` names one point of a sweep."""
    options = settings.run_options(cfg)
    experiment = catalog.load(name)
    config = settings.build_config(experiment, cfg, options.scale)
    directory = None
    if save:
        directory = Path(settings.checked_output_dir(options.output_dir)) / name / options.scale / variant
    context = record.RunContext(
        seed=options.seed,
        scale=options.scale,
        data_root=environment.resolve_data_root(options.data.root),
        device=environment.describe_device(),
    )
    started = datetime.now(UTC)
    start_s = time.perf_counter()
    rows = record.rows_to_frame(name, experiment.run(config, context))
    duration_s = time.perf_counter() - start_s
    with _rows_kept(rows, directory):
        figure = experiment.plot(rows.copy())
        comparisons = tuple(experiment.compare(rows.copy()))
    manifest = _manifest(experiment, context, config, rows, comparisons)
    manifest |= {
        "variant": variant,
        "started": started.isoformat(timespec="seconds"),
        "duration_s": duration_s,
    }
    if directory is not None:
        record.write_result(directory, rows, manifest, figure)
    return Result(rows=rows, manifest=manifest, figure=figure, comparisons=comparisons, directory=directory)


@contextmanager
def _rows_kept(rows: pd.DataFrame, directory: Path | None) -> Iterator[None]:
    """Save the rows when the code that draws or compares them fails: they may have taken hours."""
    try:
        yield
    except Exception as error:
        if directory is not None:
            file = directory / record.UNPLOTTED_FILE
            record.write_atomically(file, record.to_csv(rows))
            error.add_note(f"The rows were computed and are kept in {file}.")
        raise


def _manifest(
    experiment: catalog.Experiment,
    context: record.RunContext,
    config: Any,
    rows: pd.DataFrame,
    comparisons: Sequence[record.Comparison],
) -> dict[str, Any]:
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "claim": experiment.claim,
        "scale": context.scale,
        "seed": context.seed,
        "settings": to_plain(config),
        "data": "real files" if context.data_root else "shipped quantile tables",
        "sources": [source for source in record.SOURCES if (rows["source"] == source).any()],
        "num_rows": len(rows),
        "comparisons": [item.as_dict() for item in comparisons],
        "device": context.device,
        "git": environment.git_state(),
        "versions": environment.package_versions(),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def summary(manifest: Mapping[str, Any], directory: Path) -> str:
    """A few lines for the terminal: the compared numbers and where the files are."""
    lines = [f"{manifest['title']} [{manifest['experiment']}, scale={manifest['scale']}, seed={manifest['seed']}]"]
    if manifest["comparisons"]:
        columns = ("name", "paper", "ours", "ratio", "unit")
        table = pd.DataFrame(manifest["comparisons"])[list(columns)].rename(columns={"ratio": "ours/paper"})
        numbers = ["paper", "ours", "ours/paper"]
        table[numbers] = table[numbers].astype(float)  # None becomes NaN, which is printed as a dash
        lines.append(table.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.4g}"))
    lines.append(f"{manifest['num_rows']} rows ({', '.join(manifest['sources'])}): {directory}")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(cfg: DictConfig) -> None:
    use_files_only()
    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    variant = settings.variant_name(hydra_config.overrides.task) if is_sweep else ""
    name = hydra_config.runtime.choices["experiment"]
    try:
        result = execute(name, cfg, variant=variant)
    except Exception as error:
        if is_sweep:
            # The other jobs go on and Hydra raises only the first error, without the traceback of another
            # process.
            print(f"failed: {name} {variant}\n{_explain(error, cfg.debug)}", file=sys.stderr, flush=True)
        elif isinstance(error, LlmsysError) and not cfg.debug:
            _fail(_explain(error))
        raise
    assert result.directory is not None
    print(summary(result.manifest, result.directory), flush=True)


def use_files_only() -> None:
    """Draw to files, never to windows; for the command line, where no display need be."""
    import matplotlib

    matplotlib.use("Agg")


def _explain(error: Exception, with_traceback: bool = False) -> str:
    """The text of an expected error with its notes; the traceback of any other."""
    if with_traceback or not isinstance(error, LlmsysError):
        return "".join(traceback.format_exception(error)).rstrip()
    return "\n".join([f"error: {error}", *getattr(error, "__notes__", [])])


def _fail(text: str, code: int = 1) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Expected errors end with text and exit code 1; debug=true shows the traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = os.environ.get("HYDRA_FULL_ERROR") == "1" or "debug=true" in words
    # Hydra would print a traceback of its own making and exit; this makes it raise, so that we choose.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    is_sweep = bool({"-m", "--multirun"} & set(words))
    try:
        sys.argv[1:] = settings.prepare_overrides(words)
    except LlmsysError as error:
        _fail(_explain(error, is_debug))
    try:
        _job()
    except KeyboardInterrupt:
        _fail("interrupted: the result of the run before, if any, is as it was", INTERRUPTED)
    except Exception as error:
        if is_debug:
            raise
        if isinstance(error, SETUP_ERRORS):
            _fail(_explain(settings.composition_error(error)))
        if is_sweep:
            _fail("error: at least one job of the sweep failed, see above")
        if isinstance(error, LlmsysError):
            _fail(_explain(error))
        raise


if __name__ == "__main__":
    # By its module name: jobs in other processes must find the same classes there.
    from experiments.run import main as _main

    _main()
