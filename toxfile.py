"""A runner with which tox environments share one env_dir; by itself, tox empties it for each name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tox.plugin import impl
from tox.tox_env.api import ToxEnv
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner

if TYPE_CHECKING:
    from tox.tox_env.register import ToxEnvRegister


class SharedDirectoryRunner(VirtualEnvRunner):
    """Virtual environment that takes over the packages that another environment has installed in its directory."""

    @staticmethod
    def id() -> str:
        """Return the name that a tox environment selects the runner by."""
        return "shared-directory"

    def _setup_env(self) -> None:
        with self.cache.compare({"name": self.conf.name, "type": type(self).__name__}, ToxEnv.__name__):
            pass  # on leaving, the directory is ours
        super()._setup_env()


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    """Register the runner with tox."""
    register.add_run_env(SharedDirectoryRunner)
