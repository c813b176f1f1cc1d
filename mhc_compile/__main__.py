"""The command line: `mhc-compile explain`, `verify`, `convert`, `export` and `demo`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mhc_compile.config import BACKENDS, INITS, MHCConfig
from mhc_compile.constraints import CONSTRAINTS
from mhc_compile.errors import ConfigError, MHCError, RewriteError, wrong

_MODEL = """\
MODEL is one of
  package.module:factory  a function without arguments that returns an
                          nn.Module, or a pair (nn.Module, example_inputs);
                          modules of the current directory are found
  llama, gpt2, vit, ...   a model type of Hugging Face transformers
  config.json             the config file of such a model
  a directory             that save_pretrained wrote: its config, and its
                          weights if it holds any
"""
_STATUS = "exit status: 0 success; 1 {one}; 2 a wrong call, or a model that cannot be handled"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 1 when a check failed or nothing was found, 2 for a wrong call."""
    options = _parser().parse_args(arguments)
    try:
        with _importing_from_here():
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except MHCError as error:
        print(f"mhc-compile: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of a pipe has seen enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # status 1 would say that a check failed
        traceback.print_exc()
        print(f"mhc-compile: stopped by an unexpected {type(error).__name__}", file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mhc-compile", description="Turn PyTorch models into n-stream mHC.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_explain(commands)
    _add_verify(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_demo(commands)
    return parser


def _add_explain(commands: Any) -> None:
    explain = _model_command(
        commands,
        "explain",
        "list the residual adds of a model that a conversion would turn into sites",
        "List trunks, sites, and every add that stays plain with the reason. Nothing is converted. The model is built "
        "without weights (on the meta device) and only traced, so it may be far larger than the memory.",
        "no residual add was found",
        "mhc-compile explain llama --set num_hidden_layers=2\n  mhc-compile explain my_models:make_model --json",
    )
    explain.add_argument(
        "--with-weights",
        action="store_true",
        help="build the weights as well (all of them in memory), for a model that cannot be traced without",
    )
    explain.add_argument("--draw", type=Path, metavar="FILE", help="write a picture too: .svg, .png or .pdf")
    explain.set_defaults(run=_explain)


def _add_verify(commands: Any) -> None:
    verify = _model_command(
        commands,
        "verify",
        "convert a model in memory and check what a conversion promises",
        "Convert a model and check it: bit for bit the plain model at n = 1, the same function and gradients at step "
        "0, ops against their float64 oracle, the compiled against the rewritten graph. The weights are random, or "
        "those of the directory. A directory that a converted model was saved to is checked as it is.",
        "a check failed",
        "mhc-compile verify gpt2 --set n_layer=2 --set use_cache=false --n 2\n"
        "  mhc-compile verify my_models:make_model --json",
    )
    # None tells a given n from the default: a saved converted model has its own.
    verify.add_argument("--n", type=int, help=f"number of streams (default: {MHCConfig.n})")
    verify.add_argument(
        "--backend", choices=BACKENDS, help="what compiles the model for the last checks (default: aot_eager)"
    )
    _add_manifold(verify)
    _add_seed(verify)
    verify.set_defaults(run=_verify)


def _add_convert(commands: Any) -> None:
    convert = _model_command(
        commands,
        "convert",
        "convert a model and write it, to be loaded with mhc_compile.load",
        "Convert a model and write it to a directory: a Hugging Face model as save_pretrained does, any other module's "
        "state_dict as model.pt. The weights are random, or those of the directory.",
        "is not used",
        "mhc-compile convert gpt2 --out gpt2-mhc\n  mhc-compile convert saved/ --n 2 --skip '*.mlp' --out saved-mhc",
    )
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write: new, or empty")
    convert.add_argument("--n", type=int, default=MHCConfig.n, help="number of streams (default: %(default)s)")
    convert.add_argument("--init", choices=INITS, default=MHCConfig.init, help="initialisation (default: %(default)s)")
    _add_manifold(convert)
    for name, words in (("--only", "convert no other sites than these"), ("--skip", "leave these adds plain")):
        convert.add_argument(
            name, action="append", metavar="PATTERN", help=f"{words}: a module name such as '*.mlp'; repeatable"
        )
    convert.add_argument("--source", action="store_true", help="write the rewritten model as Python too, as model.py")
    _add_seed(convert)
    convert.set_defaults(run=_convert)


def _add_export(commands: Any) -> None:
    export = _model_command(
        commands,
        "export",
        "write a model with mHC to an ONNX file",
        "Write a converted model, or one that is mHC by itself, to an ONNX file; each site is a group of calls named "
        "after it. With --n a plain model is converted first. The weights are random, or those of the directory. "
        "A cache of keys and values is left out (use_cache=false).",
        "is not used",
        "mhc-compile export saved-mhc --out model.onnx\n  mhc-compile export gpt2 --n 4 --out gpt2.onnx",
    )
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    export.add_argument("--n", type=int, help="convert the model to so many streams first")
    export.add_argument("--fixed", action="store_true", help="fix all sizes to those of the example inputs")
    _add_seed(export)
    export.set_defaults(run=_export)


def _add_demo(commands: Any) -> None:
    words = "convert a small GPT-2, check it, train it beside the plain one, draw both"
    demo = commands.add_parser("demo", help=words, description=f"{words[0].upper()}{words[1:]}.")
    demo.add_argument("--steps", type=int, default=300, help="optimizer steps of each model (default: 300)")
    demo.add_argument("--streams", type=int, default=4, help="number of streams n (default: 4)")
    demo.add_argument("--picture", type=Path, default=Path("mhc_demo.png"), help="where the picture goes")
    demo.set_defaults(run=_demo)


def _model_command(
    commands: Any, name: str, words: str, description: str, status_one: str, examples: str
) -> argparse.ArgumentParser:
    """A command on MODEL, with the options that all of them have."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=words,
        description=f"{description}\n\n{_MODEL}",
        epilog=f"{_STATUS.format(one=status_one)}\n\nexamples:\n  {examples}",
        formatter_class=_Paragraphs,
    )
    command.add_argument("model", metavar="MODEL", help="see above")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a field of a Hugging Face config, also of an inner one (text_config.hidden_size=64); the value is "
        "JSON, or a string; architectures='[\"BertModel\"]' chooses the class; repeatable",
    )
    command.add_argument(
        "--inputs", metavar="MODULE:FUNCTION", help="a function without arguments that returns the example inputs"
    )
    command.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return command


def _add_manifold(command: argparse.ArgumentParser) -> None:
    """What keeps res in bounds, and how streams are read."""
    command.add_argument(
        "--constraint", choices=CONSTRAINTS, help="what keeps the mixing of streams in bounds (default: sinkhorn)"
    )
    command.add_argument(
        "--single-pass", action="store_true", help="read each state with the coefficients of the site before"
    )


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")


class _Paragraphs(argparse.RawDescriptionHelpFormatter):
    """Wraps the first paragraph of a description and keeps the lines of the others."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        first, *others = text.split("\n\n")
        filled = argparse.HelpFormatter._fill_text(self, first, width, indent)
        return "\n\n".join([filled, *others])


# ---------------------------------------------------------------------------------------------- commands


def _explain(options: argparse.Namespace) -> int:
    from mhc_compile.codegen.draw import check_suffix
    from mhc_compile.draw import draw
    from mhc_compile.explain import explain
    from mhc_compile.model_source import model_source, weightless, with_inputs

    if options.draw is not None:
        check_suffix(options.draw)
    with _only_json(options.json):
        source = model_source(options.model, options.set)
        real = source.converted or options.with_weights
        with _progress(f"building {source.label}"):
            built = source.build() if real else weightless(source)
        inputs = with_inputs(built, options.inputs)
        try:
            with _progress(f"tracing {type(built.model).__name__}"):
                found = explain(built.model, inputs)
                if options.draw is not None:
                    draw(built.model, inputs, options.draw)
        except Exception:
            if not real:
                print("mhc-compile: traced without weights; --with-weights builds them", file=sys.stderr)
            raise
    _print(found.as_dict() if options.json else found)
    return 0 if found.sites else 1


def _verify(options: argparse.Namespace) -> int:
    from mhc_compile.conversion import is_converted
    from mhc_compile.convert import mhc_compile
    from mhc_compile.verify import verify

    # The check at step 0 brings the identity itself. The others would see equal streams with it.
    n = MHCConfig.n if options.n is None else options.n
    config = MHCConfig(n=n, init="paper", backend=options.backend or "aot_eager", **_manifold(options))
    with _only_json(options.json):
        built, inputs = _seeded(options)
        model = built.model
        if is_converted(model):
            for name in ("n", "backend", "constraint", "single_pass"):
                if getattr(options, name) not in (None, False):
                    flag = name.replace("_", "-")
                    step = f"leave --{flag} away"
                    raise ConfigError(wrong(f"--{flag}", "given", "for a model that is not converted yet", step))
        else:
            with _progress(f"converting {type(model).__name__} to n = {n}"):
                mhc_compile(model, config=config, example_inputs=inputs)
        with _progress(f"checking {type(model).__name__}"):
            report = verify(model, inputs)
    _print(report.as_dict() if options.json else report)
    return 0 if report else 1


def _convert(options: argparse.Namespace) -> int:
    from mhc_compile.convert import mhc_compile
    from mhc_compile.source import source

    config = MHCConfig(n=options.n, init=options.init, **_manifold(options))
    if config.n == 1:
        raise ConfigError(wrong("--n", 1, "2 or more", "with n = 1 the model stays the plain one"))
    _check_empty(options.out)
    with _only_json(options.json):
        built, inputs = _seeded(options)
        model, loadable = built.model, _is_library_class(built.model)
        own = sum(parameter.numel() for parameter in model.parameters())
        with _progress(f"converting {type(model).__name__} to n = {config.n}"):
            mhc_compile(model, config=config, example_inputs=inputs, only=options.only, skip=options.skip)
        written_source = source(model, inputs) if options.source else None
        load = _write(model, options.out, "" if loadable else built.again)
        if written_source is not None:
            written_source.save(options.out / "model.py")
    from mhc_compile.conversion import conversion

    written = {
        "model": type(model).__name__,
        "out": str(options.out),
        "files": sorted(path.name for path in options.out.iterdir()),
        "n": config.n,
        "init": config.init,
        "sites": [site.name for site in conversion(model).record.sites],
        "parameters": own,
        "mhc_parameters": sum(parameter.numel() for parameter in model.parameters()) - own,
        "load": load,
    }
    _print(written if options.json else _in_words(written))
    return 0


def _export(options: argparse.Namespace) -> int:
    from mhc_compile.convert import mhc_compile
    from mhc_compile.export import export_onnx

    with _only_json(options.json):
        built, inputs = _seeded(options)
        model = built.model
        for module in model.modules():  # a cache of keys and values is an object that no file can hold
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False
        if options.n is not None:
            with _progress(f"converting {type(model).__name__} to n = {options.n}"):
                mhc_compile(model, n=options.n, example_inputs=inputs)
        with _progress(f"writing {options.out}"):
            written = export_onnx(model, inputs, options.out, dynamic=not options.fixed)
    _print(written.as_dict() if options.json else written)
    return 0


def _manifold(options: argparse.Namespace) -> dict[str, Any]:
    return {"constraint": options.constraint or MHCConfig.constraint, "single_pass": options.single_pass}


def _demo(options: argparse.Namespace) -> int:
    from mhc_compile.demo import DemoOptions, run_demo

    if options.steps < 1 or options.streams < 2:
        found = f"{options.steps} and {options.streams}"
        raise ConfigError(wrong("--steps and --streams", found, "at least 1 and at least 2"))
    return 0 if run_demo(DemoOptions(n=options.streams, steps=options.steps, picture=options.picture)) else 1


# ---------------------------------------------------------------------------------------------- steps


def _seeded(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model of MODEL with weights, and its example inputs."""
    import torch

    from mhc_compile.model_source import model_source, with_inputs

    source = model_source(options.model, options.set)
    if source.converted and options.command == "convert":
        raise RewriteError(f"{source.label} holds a converted model already; load it with mhc_compile.load")
    torch.manual_seed(options.seed)
    with _progress(f"building {source.label}"):
        built = source.build()
    return built, with_inputs(built, options.inputs)


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = f"{out}, which holds files" if out.is_dir() else f"{out}, which is a file"
        raise ConfigError(wrong("--out", found, "a directory that is empty or does not exist", "choose another"))


def _is_library_class(model: Any) -> bool:
    """A class of transformers itself, which `mhc_compile.load` finds by its name."""
    from mhc_compile.hugging_face import is_pretrained_model

    if not is_pretrained_model(model):
        return False
    import transformers

    return getattr(transformers, type(model).__name__, None) is type(model)


def _write(model: Any, out: Path, again: str) -> str:
    """Write a converted model; gives the Python that loads it.

    again: `module:expression` that makes the plain model, '' for one that save_pretrained writes.
    """
    import torch

    out.mkdir(parents=True, exist_ok=True)
    if not again:
        with _progress(f"writing {out}"):
            model.save_pretrained(out)
        return f"import mhc_compile; model = mhc_compile.load({str(out)!r})"
    path = out / "model.pt"
    with _progress(f"writing {path}"):
        torch.save(model.state_dict(), path)
    module, _, make = again.partition(":")
    return f"import mhc_compile, {module}; model = mhc_compile.load({str(path)!r}, {module}.{make})"


def _in_words(written: dict[str, Any]) -> str:
    sites = len(written["sites"])
    return (
        f"{written['model']}: {sites} site{'' if sites == 1 else 's'} at n = {written['n']}, "
        f"{written['mhc_parameters']:,} mHC parameters beside {written['parameters']:,} of the model\n"
        f"written to {written['out']}: {', '.join(written['files'])}\n"
        f"load it again in Python:\n  {written['load']}"
    )


def _print(result: Any) -> None:
    print(json.dumps(result, indent=2) if isinstance(result, dict) else result)


@contextlib.contextmanager
def _only_json(wanted: bool) -> Iterator[None]:
    """With --json, what a model's own code prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """`package.module` is found in the current directory too, as with `python -m`."""
    before = list(sys.path)
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _progress(step: str) -> Iterator[None]:
    """Say on a terminal what is being done, and how long it took."""
    if not sys.stderr.isatty():
        yield
        return
    print(f"mhc-compile: {step} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"mhc-compile: {step}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
