"""How does one write a report, and make one of many?"""

from torchguard._report._merging import merge
from torchguard._report._records import Report, ReportError
from torchguard._report._writer import ReportWriter, open_report

__all__ = ["Report", "ReportError", "ReportWriter", "merge", "open_report"]
