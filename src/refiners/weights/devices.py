"""Whether this machine has a device, said before anything is read or built for it."""

import torch

_LONGEST_REASON = 200  # of torch's own words, which for some devices go on for pages


def check_is_available(device: torch.device | str) -> None:
    """Raise RuntimeError, in plain words, if this machine or this build of torch has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which one depends on the kind of device
        reason = str(error).partition("\n")[0].partition(". ")[0][:_LONGEST_REASON]
        raise RuntimeError(
            f"device {str(device)!r} is not available on this machine or in this build of torch ({reason}); "
            "try device='cpu'"
        ) from error
