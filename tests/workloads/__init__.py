"""Random workloads, the drivers that run them, and the oracle that judges their runs.

    model.py     what a workload is; as_code
    making.py    make_workload(seed)
    running.py   DRIVERS
    oracle.py    check, faults_of; stories.py: the log, read
    replay.py    the log, played again; books.py: what is in use
"""

from .making import make_workload
from .model import HANG, Call, Job, Share, Verdicts, Workload, as_code, as_simulated
from .oracle import Broken, TooLate, check, faults_of
from .running import DRIVERS, Driver, Seen, run_simulated

__all__ = [
    "DRIVERS", "HANG", "Broken", "Call", "Driver", "Job", "Seen", "Share", "TooLate", "Verdicts", "Workload", "as_code",
    "as_simulated", "check", "faults_of", "make_workload", "run_simulated",
]
