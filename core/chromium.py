"""Which Chromium is used: Playwright's own if it was downloaded, else the system's."""

import shutil
import subprocess
import sys

SYSTEM = ("chromium", "chromium-browser", "google-chrome")
DEADLINE_S = 60.0
PLAYWRIGHTS = """\
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    print(playwright.chromium.executable_path)
"""


def chromiums() -> list[str]:
    """The paths of those that are there, first choice first. One may still not start."""
    # In a process of its own: Playwright's blocking half refuses to work beside an event loop.
    result = subprocess.run(
        [sys.executable, "-c", PLAYWRIGHTS], capture_output=True, text=True, timeout=DEADLINE_S
    )
    names = [*result.stdout.split("\n")[:1], *SYSTEM]
    return list(dict.fromkeys(filter(None, map(shutil.which, names))))


def starts(program: str) -> bool:
    """Whether it finds all that it is linked to."""
    try:
        result = subprocess.run([program, "--version"], capture_output=True, timeout=DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


def chromium() -> str:
    """The first that starts.

    Raises:
        FileNotFoundError: none does; it says what to install.
    """
    found = chromiums()
    if program := next(filter(starts, found), None):
        return program
    failed = f" ({', '.join(found)} did not start)" if found else ""
    raise FileNotFoundError(
        f"no Chromium{failed}: install chromium by the system's package manager, or run "
        "`playwright install --with-deps chromium`"
    )


if __name__ == "__main__":
    for path in chromiums():
        print(path)
