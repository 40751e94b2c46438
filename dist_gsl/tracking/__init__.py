"""Tracking of runs: MLflow, or nothing."""

from dist_gsl.tracking.base import NullTracker, Status, Tracker, epoch_metrics
from dist_gsl.tracking.mlflow_tracker import EXPERIMENT, MlflowTracker, create_store
from dist_gsl.tracking.store import artifact_root, check_owner, masked, tracking_uri

__all__ = [
    "EXPERIMENT",
    "MlflowTracker",
    "NullTracker",
    "Status",
    "Tracker",
    "artifact_root",
    "check_owner",
    "create_store",
    "epoch_metrics",
    "masked",
    "tracking_uri",
]
