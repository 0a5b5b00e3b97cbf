"""The ``course`` command. Each subcommand imports what it needs when it is called."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Sequence

from course_lib import __version__
from course_lib.checkout import CheckoutNotFoundError


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``course`` with all its subcommands."""
    from course_lib import doctor, fetch, lab
    from course_lib.grading import commands

    parser = argparse.ArgumentParser(
        prog="course",
        description="Learn the Transformer by building it.",
        epilog="course COMMAND --help says more about each.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"course {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    lab.add_parser(subparsers)
    doctor.add_parser(subparsers)
    fetch.add_parser(subparsers)
    commands.add_parsers(subparsers)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; only a command that passes arguments on may get unknown ones."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command is None:
        parser.print_help()
        parser.exit(2)
    if hasattr(parsed, "passed_on"):
        parsed.passed_on = rest
    elif rest:
        parser.error(f"course {parsed.command} does not know: {' '.join(rest)}")
    return parsed


def extra_that_brings(module: str) -> str | None:
    """The extra of this package that installs ``module``, or None if none does."""
    package = module.partition(".")[0].replace("_", "-").lower()
    for requirement in importlib.metadata.requires("course-lib") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name and extra and name[0].replace("_", "-").lower() == package:
            return extra[1]
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``course`` and return its exit code; what the user can mend is said in one line."""
    parsed = parse(arguments)
    try:
        return parsed.run(parsed)
    except CheckoutNotFoundError as error:
        print(f"course {parsed.command}: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        extra = extra_that_brings(error.name or "")
        if extra is None:
            raise
        print(
            f"course {parsed.command} needs {error.name}: pip install 'course-lib[{extra}]'",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
