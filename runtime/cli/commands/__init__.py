"""The party's commands: importing a module registers its commands, in the order of `--help`."""

# isort: off
from mergec.runtime.cli.commands import certs  # noqa: F401
from mergec.runtime.cli.commands import doctor  # noqa: F401
from mergec.runtime.cli.commands import audit  # noqa: F401
from mergec.runtime.cli.commands import services  # noqa: F401
from mergec.runtime.cli.commands import answers  # noqa: F401
from mergec.runtime.cli.commands import proxy  # noqa: F401
from mergec.runtime.cli.commands import datastore  # noqa: F401
