"""Sampling parameters as /v1/.../render shows them."""

from dataclasses import asdict
from typing import Any

from contracts.sampling import SamplingParams


def sampling_json(params: SamplingParams) -> dict[str, Any]:
    """All of them by name, as JSON has them."""
    return {
        **asdict(params),
        "logit_bias": {str(token_id): value for token_id, value in params.logit_bias},
    }
