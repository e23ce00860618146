"""The address of the repository, as setup.cfg says it: the only place where it is set."""

import configparser
from pathlib import Path

BRANCH = "main"

_settings = configparser.ConfigParser()
_settings.read(Path(__file__).parent.parent / "setup.cfg")
URL = _settings["metadata"]["url"]
