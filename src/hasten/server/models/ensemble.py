"""Ensembles: steps that are models themselves, and the tensors that go from one to the next.

Steps run in an order in which each has what it needs. Where a step gives several responses, the steps after it run for
each of them, so an ensemble streams as its steps do.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Any, TypeAlias

from tritonclient.grpc import model_config_pb2

from hasten.server.models.config import is_decoupled, wrong
from hasten.server.models.interfaces import datatype_name
from hasten.server.models.model import Model
from hasten.server.models.work import Work
from hasten.server.types import InferRequest, InferResponse, Parameter, RequestedOutput, ServiceError, Tensor

if TYPE_CHECKING:
    from hasten.server.lifecycle import Registry
    from hasten.server.version import Version

Step: TypeAlias = Any  # model_config_pb2.ModelEnsembling.Step, which has no types


class Ensemble(Model):
    """One version of an ensemble."""

    def __init__(self, config: model_config_pb2.ModelConfig, models: "Registry") -> None:
        self._name = config.name
        self._models = models
        self._steps = ordered_steps(config)
        self._outputs = [tensor.name for tensor in config.output]
        _check_types(config, models)
        steps = [models.find(step.model_name, step.model_version).config for step in self._steps]
        config.model_transaction_policy.decoupled = any(is_decoupled(step) for step in steps)

    @property
    def ready(self) -> bool:
        """Whether all steps are."""
        return all(self._models.find(step.model_name, step.model_version).model.ready for step in self._steps)

    async def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        """A response for each one of the last step."""
        work.known_parameters()
        work.clock.prepare()
        with ExitStack() as held:
            served = [self._models.find(step.model_name, step.model_version) for step in self._steps]
            for each in served:  # all from the beginning: one that is unloaded meanwhile still has its turn
                held.enter_context(each)
            async with aclosing(self._run(list(zip(self._steps, served, strict=True)), work.inputs, work)) as results:
                async for tensors, final in results:
                    work.clock.compute()
                    names = [name for name in self._outputs if name in work.outputs and name in tensors]
                    yield work.response([_renamed(tensors[name], name) for name in names], final)

    async def _run(
        self, steps: list[tuple[Step, "Version"]], tensors: Mapping[str, Tensor], work: Work
    ) -> AsyncGenerator[tuple[Mapping[str, Tensor], bool], None]:
        """What is known after these steps, and whether nothing follows."""
        if not steps:
            yield tensors, True
            return
        (step, served), *later = steps
        async with aclosing(self._responses(step, served, tensors, work)) as responses:
            async for response in responses:
                produced = {step.output_map[tensor.name]: tensor for tensor in response.outputs}
                async with aclosing(self._run(later, {**tensors, **produced}, work)) as results:
                    async for known, final in results:
                        yield known, final and response.final

    async def _responses(
        self, step: Step, version: "Version", tensors: Mapping[str, Tensor], work: Work
    ) -> AsyncGenerator[InferResponse, None]:
        request = InferRequest(
            model=step.model_name,
            # an optional input that nobody gave, or an output that was not made, is left out
            inputs=[_renamed(tensors[ours], theirs) for theirs, ours in step.input_map.items() if ours in tensors],
            id=work.id,
            parameters=_queueing(work),
            outputs=[RequestedOutput(name) for name in step.output_map],
        )
        try:
            async with aclosing(version.run(request)) as responses:
                async for response in responses:
                    yield response
        except ServiceError as error:
            # the step's own cause is what failures are counted by
            raise ServiceError(
                error.kind, f"in ensemble '{self._name}', {error}", error.retry_after
            ) from error.__cause__


def ordered_steps(config: model_config_pb2.ModelConfig) -> list[Step]:
    """The steps, each after those that it needs; ConfigError where there is no such order or a tensor has no source."""
    known, waiting, ordered = (
        {tensor.name for tensor in config.input},
        list(config.ensemble_scheduling.step),
        list[Step](),
    )
    sources = [*known, *(name for step in waiting for name in step.output_map.values())]
    twice = [name for index, name in enumerate(sources) if name in sources[:index]]
    if twice:
        raise wrong(config, f"tensor '{twice[0]}' comes from two places")
    while waiting:
        step = next((step for step in waiting if known.issuperset(step.input_map.values())), None)
        if step is None:
            lacks = [name for step in waiting for name in step.input_map.values() if name not in known]
            raise wrong(config, f"tensor '{lacks[0]}' is needed by a step, but comes from no earlier one")
        if step.model_namespace:
            raise wrong(config, "model_namespace is not supported; remove it")
        waiting.remove(step)
        ordered.append(step)
        known |= set(step.output_map.values())
    lacks = [tensor.name for tensor in config.output if tensor.name not in known]
    if lacks or not ordered:
        raise wrong(config, f"output '{lacks[0]}' comes from no step" if lacks else "it has no steps")
    return ordered


def _check_types(config: model_config_pb2.ModelConfig, models: "Registry") -> None:
    """ConfigError where a step has no such tensor, or two ends of one name have different types."""
    types = {tensor.name: tensor.data_type for tensor in (*config.input, *config.output)}
    for step in ordered_steps(config):
        served = models.find(step.model_name, step.model_version).config
        for what, mapping, tensors in (
            ("input", step.input_map, served.input),
            ("output", step.output_map, served.output),
        ):
            theirs = {tensor.name: tensor.data_type for tensor in tensors}
            for name, ours in mapping.items():
                if name not in theirs:
                    raise wrong(config, f"model '{step.model_name}' has no {what} '{name}'")
                if types.setdefault(ours, theirs[name]) != theirs[name]:
                    found, wanted = datatype_name(types[ours]), datatype_name(theirs[name])
                    raise wrong(
                        config, f"tensor '{ours}' is {found}, but {what} '{name}' of '{step.model_name}' is {wanted}"
                    )


def _queueing(work: Work) -> dict[str, Parameter]:
    """How a step waits, and what its prompts are kept apart by: as the whole does."""
    wait = work.queueing
    parameters: dict[str, Parameter] = {"priority": wait.priority} if wait.priority else {}
    parameters |= {} if wait.salt is None else {"cache_salt": wait.salt}
    return parameters if wait.timeout is None else {**parameters, "timeout": round(wait.timeout * 1e6)}


def _renamed(tensor: Tensor, name: str) -> Tensor:
    return Tensor(name, tensor.datatype, tensor.shape, tensor.data)
