"""A generation's conversation with its ControlNets: asked before each evaluation, heard while it is under way."""

from collections.abc import Callable
from time import perf_counter

from imagemesh_runtime.context import set_current_call
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.control import Question, Told
from imagemesh_services.diffusion.generation import Generation
from imagemesh_services.diffusion.incoming import Incoming


async def steer(generation: Generation, lane: Lane, metrics: Metrics, wake: Callable[[], None]) -> None:
    """Ask for the residuals of every evaluation that is left, as part of the generation's own call.

    The generation may run as soon as the first residuals of an evaluation are there: then the ControlNet is at it, and
    the UNet does what it can without them. ``wake`` is called whenever it may have become runnable.

    Raises:
        MeshError: a ControlNet failed, or did not answer in time.
    """
    set_current_call(generation.call)
    assert generation.open_control is not None
    run = generation.started
    told = await lane.run(Told.of, run)
    async with generation.open_control(told) as control:
        for evaluation in range(generation.evaluated, run.evaluations):
            await generation.wanted.wait()
            generation.wanted.clear()
            incoming, asked = Incoming(), perf_counter()

            def begun(incoming: Incoming = incoming, asked: float = asked) -> None:
                metrics.control_stall.observe(perf_counter() - asked, "before")
                generation.residuals, generation.steered = incoming, True
                wake()

            places = control.at_work(evaluation, run.evaluations)
            if not places:
                generation.steered = True
                wake()
                continue
            told = await lane.run(Told.of, run, told)
            sample, timestep = await lane.run(run.model_input)
            await control.residuals(Question(sample, timestep, told, places), incoming, begun)
            metrics.control_bytes.inc(sum(one.nbytes for one in (*incoming.down, incoming.mid)))
            generation.control_backends = control.backends
            wake()
