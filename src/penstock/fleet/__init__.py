"""Decisions above one engine: who may enter, and which models are in memory. Time is an argument, in seconds of any
monotonic clock."""

from penstock.fleet.admission import Admission, Rates, Visit
from penstock.fleet.bucket import Allowance, Bucket
from penstock.fleet.residency import Residency, Resident, Stay, Ticket, Turn

__all__ = ["Admission", "Allowance", "Bucket", "Rates", "Residency", "Resident", "Stay", "Ticket", "Turn", "Visit"]
