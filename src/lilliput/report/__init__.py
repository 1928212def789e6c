"""Reports on runs: the live table, run trackers, figures, and the comparison of finished runs."""

from lilliput.report.board import TensorBoard, WandB
from lilliput.report.compare import Comparison, compare
from lilliput.report.live import Lines, Table, live

__all__ = ["Comparison", "Lines", "Table", "TensorBoard", "WandB", "compare", "live"]
