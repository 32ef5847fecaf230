"""The folder of a run appears with its configuration in it: however early the run is killed, it can be resumed."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from iexact_runner import cli
from iexact_runner.errors import UserError


class Beginning(Callback):
    """What Hydra calls before it makes the folder of a run, which it would leave empty until the run is set up."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Makes the folder of a run that begins; what is wrong with the command is told when the run is set up.

        Args:
            config: as composed, with its ``hydra`` node.
            kwargs: not used.
        """
        from iexact_runner.runs.resume import newest_unfinished

        task = copy.deepcopy(config)
        with read_write(task), open_dict(task):
            del task["hydra"]
        messages = logging.getLogger("iexact_runner")
        try:
            checked = cli.to_config(task)
            messages.disabled = True  # the same is looked for again, and told then
            goes_on = checked.resume is not None and (
                checked.resume != "auto" or newest_unfinished(Path(checked.output_dir), asdict(checked)) is not None
            )
            if not goes_on:
                _make(Path(config.hydra.run.dir), OmegaConf.to_yaml(task, resolve=True))
        except (UserError, OmegaConfBaseException, OSError):
            return
        finally:
            messages.disabled = False


def _make(folder: Path, yaml: str) -> None:
    """Makes a folder with a configuration in it at one blow, unless there is something in its place.

    Raises:
        OSError: if it cannot be made.
    """
    from iexact_runner.runs.files import TEMPORARY, current_umask, write_atomically
    from iexact_runner.runs.records import CONFIG

    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{TEMPORARY}{folder.name}."))
    try:
        place.chmod(0o777 & ~current_umask())
        write_atomically(place / CONFIG, yaml)
        place.rename(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
