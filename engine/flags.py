"""The command line that a Config is."""

import argparse
import dataclasses
import difflib
import shlex
import typing

from data import UserError
from engine.config import Config
from engine.field import GROUPS, flag, inherited


AS_ABOVE = "the defaults above; None is what other settings, the encoder or the device decide"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        known = [*self._option_string_actions]
        _, _, unknown = message.partition("unrecognized arguments: ")
        words = [w.split("=")[0] for w in unknown.split() if w.startswith("--")]
        near = [difflib.get_close_matches(w, known, 1) for w in words]
        near = ", ".join(x for found in near for x in found)
        meant = f"; did you mean {near}?" if near else ""
        meant += ": a Mac trains on its CPU here, MPS was never tried" if "'mps'" in message else ""
        if "--image-size:" in message:
            wide = "--crop-width" in self._option_string_actions
            meant += ": --crop-width is the width" if wide else ": images are square here"
        raise UserError(f"{message}{meant} (--help lists every flag)")


def parse(
    cls: type[Config], presets: dict[str, dict], doc: str, argv: list[str] | None = None
) -> Config:
    """Build a Config: command line before preset before class default."""
    hints = typing.get_type_hints(cls)
    usual = [flag(n) + " ..." * (hints[n] is not bool) for n in cls.USUAL if n not in cls.SET]
    parser = Parser(
        description=doc,
        usage=f"%(prog)s {' '.join(usual)}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for f in (f for f in dataclasses.fields(cls) if f.name not in cls.SET):
        kind, *_ = typing.get_args(hints[f.name]) or (hints[f.name],)  # int of `int | None`
        choices = list(presets) if f.name == "model" else f.metadata["choices"]
        shown = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        else:
            extra = {"type": kind, "choices": choices}
            extra |= {} if choices else {"metavar": kind.__name__}
        group = groups[inherited(cls, f.name, "group") or "model"]
        shown = argparse.SUPPRESS if f.name in cls.FURTHER else shown
        group.add_argument(flag(f.name), default=argparse.SUPPRESS, help=shown, **extra)
    rare = [flag(name) for name in cls.FURTHER if name not in cls.SET]
    further = f"further flags: {' '.join(rare)}\n\n" if rare else ""
    parser.epilog = further + "presets (--model), which change these defaults:"
    for name, values in presets.items():
        words = [str(x) for k, v in values.items() for x in (flag(k), v)]
        parser.epilog += f"\n  {name}: {shlex.join(words) or AS_ABOVE}"
    given = vars(parser.parse_args(argv))
    preset = presets[given.get("model", cls.model)]
    cfg = cls(**{**preset, **given})
    cfg.resolve()
    return cfg
