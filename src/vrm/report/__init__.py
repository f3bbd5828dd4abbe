"""Tables, verdicts and HTML pages, made of run folders alone."""

from vrm.report.command import command
from vrm.report.files import write_tables
from vrm.report.html import write_report, write_run_report
from vrm.report.tables import Sample, comparisons, summarise, table, verdict

__all__ = [
    "Sample",
    "command",
    "comparisons",
    "summarise",
    "table",
    "verdict",
    "write_report",
    "write_run_report",
    "write_tables",
]
