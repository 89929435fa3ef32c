"""Decisions above a single engine: who may enter. Time is an argument, in seconds of any monotonic clock."""

from penstock.fleet.admission import Admission, Rates, Visit
from penstock.fleet.bucket import Allowance, Bucket

__all__ = ["Admission", "Allowance", "Bucket", "Rates", "Visit"]
