"""What is generated is current, and what the README shows composes."""

import re
import shlex
from pathlib import Path

from soup.cli.main import main
from soup.rules import markdown

ROOT = Path(__file__).parent.parent


def test_rules_page_is_current():
    assert (ROOT / "docs/rules.md").read_text() == markdown()


def test_every_command_of_the_readme_composes(capsys):
    commands = re.findall(r"^    python -m soup (.*?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) >= 6
    for command in commands:
        words = [
            word
            for word in shlex.split(command)
            if word not in ("--multirun", "plan", "prove", "data", "why")
        ]
        if words[:1] == ["runs"]:
            continue
        sweeps = [word.partition(",")[0] for word in words]
        assert main([*sweeps, "--cfg", "job"]) == 0, command
    capsys.readouterr()
