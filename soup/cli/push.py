"""`soup runs push RUN HUB_NAME [--merged]`: uploads a run's model, with the hub client's own authentication."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from soup.errors import Problem, Refused
from soup.record import Run, find

EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"


def push(words: list[str], args: Namespace) -> int:
    """Makes a private repository of that name, if there is none, and uploads the model folder to it."""
    if len(words) != 2:
        raise Refused(
            Problem(key="runs push", why="takes a run and a name", fix="soup runs push RUN OWNER/NAME")
        )
    (run,), name = find(Path(args.run_root), words[:1]), words[1]
    folder = run.folder / "merged" if args.merged else run.model
    if not folder.is_dir():
        fix = f"soup runs export --merged {run.id}" if args.merged else f"soup runs resume {run.id}"
        raise Refused(Problem(key="run", value=run.id, why=f"has no {folder.name}/ yet", fix=fix))
    with TemporaryDirectory(prefix="soup-push-") as scratch:
        staged = stage(run, folder, Path(scratch) / "model")
        print(_uploaded(staged, name, run))
    return 0


def stage(run: Run, folder: Path, target: Path) -> Path:
    """A copy that names its base as others can load it: an adapter holds the folder where its base lay here.

    Raises:
        Refused: the base is a folder on this machine.
    """
    shutil.copytree(folder, target)
    adapter = target / "adapter_config.json"
    if adapter.is_file():
        model = run.tree()["model"]
        base = EMBEDDED if model["name"] == "smollm2" else model["base"]
        if Path(base).expanduser().exists() or base.startswith((".", "/", "~")):
            why = f"its adapter is for {base}, a folder that only this machine has"
            fix = f"soup runs export --merged {run.id}, then soup runs push --merged {run.id} NAME"
            raise Refused(Problem(key="runs push", value=run.id, why=why, fix=fix))
        content: dict[str, Any] = json.loads(adapter.read_text())
        content |= {"base_model_name_or_path": base, "revision": model.get("revision")}
        adapter.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    card = target / "README.md"
    if not card.is_file() and (run.model / "README.md").is_file():
        shutil.copy(run.model / "README.md", card)
    return target


def _uploaded(folder: Path, name: str, run: Run) -> str:
    from httpx import HTTPError, TransportError
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    elsewhere = f"where no hub can be reached, copy {run.folder} to a machine that reaches one"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set, so no hub is asked"
        fix = f"unset HF_HUB_OFFLINE; {elsewhere}"
        raise Refused(Problem(key="runs push", value=name, why=why, fix=fix))
    if get_token() is None:
        why = "the hub client is not logged in"
        raise Refused(Problem(key="runs push", value=name, why=why, fix="hf auth login, or set HF_TOKEN"))
    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Trained by soup")
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "a name OWNER/NAME that your token may write to"
        if isinstance(error, TransportError):
            why, fix = f"{constants.ENDPOINT} does not answer: {why}", elsewhere
        raise Refused(Problem(key="runs push", value=name, why=why, fix=fix)) from error
    return str(url)
