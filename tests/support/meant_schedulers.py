"""What each scheduler's name stands for, written out by hand from AUTOMATIC1111's and diffusers' documentation.

The parity tests' reference draws by this table and not by the one under test: a wrong row there shows.
"""

from typing import Any, Final

_KARRAS = {"use_karras_sigmas": True}
_EXPONENTIAL = {"use_exponential_sigmas": True}
_BETA = {"use_beta_sigmas": True}
_2S = {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True}
_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_3M = {"algorithm_type": "dpmsolver++", "solver_order": 3}
_2M_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}

MEANT: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "IPNDM": ("IPNDMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", _KARRAS),
    "Euler Exponential": ("EulerDiscreteScheduler", _EXPONENTIAL),
    "Euler Beta": ("EulerDiscreteScheduler", _BETA),
    "Heun": ("HeunDiscreteScheduler", {}),
    "Heun Karras": ("HeunDiscreteScheduler", _KARRAS),
    "Heun Exponential": ("HeunDiscreteScheduler", _EXPONENTIAL),
    "Heun Beta": ("HeunDiscreteScheduler", _BETA),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", _KARRAS),
    "LMS Exponential": ("LMSDiscreteScheduler", _EXPONENTIAL),
    "LMS Beta": ("LMSDiscreteScheduler", _BETA),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", _KARRAS),
    "DPM2 Exponential": ("KDPM2DiscreteScheduler", _EXPONENTIAL),
    "DPM2 Beta": ("KDPM2DiscreteScheduler", _BETA),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", _KARRAS),
    "DPM2 a Exponential": ("KDPM2AncestralDiscreteScheduler", _EXPONENTIAL),
    "DPM2 a Beta": ("KDPM2AncestralDiscreteScheduler", _BETA),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", _2S),
    "DPM++ 2S Karras": ("DPMSolverSinglestepScheduler", _2S | _KARRAS),
    "DPM++ 2S Exponential": ("DPMSolverSinglestepScheduler", _2S | _EXPONENTIAL),
    "DPM++ 2S Beta": ("DPMSolverSinglestepScheduler", _2S | _BETA),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _2M),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", _2M | _KARRAS),
    "DPM++ 2M Exponential": ("DPMSolverMultistepScheduler", _2M | _EXPONENTIAL),
    "DPM++ 2M Beta": ("DPMSolverMultistepScheduler", _2M | _BETA),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", _3M),
    "DPM++ 3M Karras": ("DPMSolverMultistepScheduler", _3M | _KARRAS),
    "DPM++ 3M Exponential": ("DPMSolverMultistepScheduler", _3M | _EXPONENTIAL),
    "DPM++ 3M Beta": ("DPMSolverMultistepScheduler", _3M | _BETA),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _2M_SDE),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", _2M_SDE | _KARRAS),
    "DPM++ 2M SDE Exponential": ("DPMSolverMultistepScheduler", _2M_SDE | _EXPONENTIAL),
    "DPM++ 2M SDE Beta": ("DPMSolverMultistepScheduler", _2M_SDE | _BETA),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "DPM++ SDE Karras": ("DPMSolverSDEScheduler", _KARRAS),
    "DPM++ SDE Exponential": ("DPMSolverSDEScheduler", _EXPONENTIAL),
    "DPM++ SDE Beta": ("DPMSolverSDEScheduler", _BETA),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DEIS Karras": ("DEISMultistepScheduler", _KARRAS),
    "DEIS Exponential": ("DEISMultistepScheduler", _EXPONENTIAL),
    "DEIS Beta": ("DEISMultistepScheduler", _BETA),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC Karras": ("UniPCMultistepScheduler", _KARRAS),
    "UniPC Exponential": ("UniPCMultistepScheduler", _EXPONENTIAL),
    "UniPC Beta": ("UniPCMultistepScheduler", _BETA),
    "SA Solver": ("SASolverScheduler", {}),
    "SA Solver Karras": ("SASolverScheduler", _KARRAS),
    "SA Solver Exponential": ("SASolverScheduler", _EXPONENTIAL),
    "SA Solver Beta": ("SASolverScheduler", _BETA),
}
