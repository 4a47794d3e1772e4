"""Fields of a configuration: a value's source, what it may be, and the answer to a wrong one."""

import dataclasses
import functools
import typing

from data import UserError

GROUPS = ("data", "model", "masking", "optimisation", "run")  # of --help, in this order


def arg(
    default: object, source: str, choices: list | None = None, within: str = "", group: str = ""
) -> typing.Any:
    """A configuration field.

    Args:
        default: None where another field decides.
        source: the table or section it comes from, or who set it; shown by --help.
        choices: what it may be.
        within: what range, e.g. "[0, 1)" or "(0, inf)".
        group: of --help; of a field that `Config` has, its own, of others "model".
    """
    metadata = {"help": source, "choices": choices, "within": within, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


data_arg = functools.partial(arg, group="data")
optim_arg = functools.partial(arg, group="optimisation")
run_arg = functools.partial(arg, group="run")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def inherited(cls: type, name: str, key: str) -> str:
    """What the nearest class that says anything says of a field: its `group` or `within`."""
    for base in cls.__mro__:
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata.get(key):
            return field.metadata[key]
    return ""


def inside(value: float, within: str) -> bool:
    """Whether a number lies in a range such as "[0, 1)"; in "" all do."""
    if not within:
        return True
    low, high = map(float, within[1:-1].split(","))
    return (low < value if within[0] == "(" else low <= value) and (
        value < high if within[-1] == ")" else value <= high
    )


def refusal(within: str) -> str:
    if within.endswith("inf)"):
        return "must be above 0" if within[0] == "(" else "must be 0 or above"
    return f"is outside {within}"


def require(*checks: tuple[object, str, str]) -> None:
    """UserError of the first (holds, field, words) that does not hold."""
    for holds, name, words in checks:
        if not holds:
            raise UserError(f"{flag(name)} {words}")


def nearest(n: int, k: int) -> str:
    """The multiples of k around n, in words; none is below k."""
    return " or ".join(map(str, sorted({max(n // k, 1) * k, (n // k + 1) * k})))


def divides(cfg: object, whole: str, part: str) -> None:
    """UserError naming the nearest values that work unless `part` divides `whole`."""
    n, k = getattr(cfg, whole), getattr(cfg, part)
    if k <= 0 or n <= 0:
        raise UserError(f"{flag(whole)} {n} and {flag(part)} {k} must be above 0")
    words = f"{n} is not divisible by {flag(part)} {k}; nearest that work: {nearest(n, k)}"
    require((n % k == 0, whole, words))
