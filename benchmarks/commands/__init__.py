"""The commands of ``adfq``, a module each: its `add` adds the command's parser, whose default ``action`` runs it."""

from benchmarks.commands import bench, describe, export, figure, listing, quantize, regress, report, results, run, table

#: In the order of the help.
COMMANDS = (run, quantize, export, describe, table, report, regress, figure, bench, results, listing)
