"""Between the Open Inference Protocol's messages and arrays."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from imagemesh_runtime.errors import InvalidArgument, MeshError
from imagemesh_runtime.oip_memory import Regions, require_near
from imagemesh_runtime.oip_models import DTYPES, VERSION, Arrays, OipModel, TensorSpec, Times
from imagemesh_runtime.oip_tensors import (
    MAX_CLASSES,
    check_shape,
    classified,
    datatype_of,
    from_bytes,
    from_contents,
    to_bytes,
)
from imagemesh_runtime.tensors import Array

_REGION, _SIZE, _OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"


def _whole(parameters: Mapping[str, Any], name: str) -> int:
    """A parameter that is a whole number; 0 if it is left out."""
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"parameters[{name!r}]", value, "a whole number")
    return value


def values_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as Python has them."""
    return {
        name: getattr(one, kind) for name, one in parameters.items() if (kind := one.WhichOneof("parameter_choice"))
    }


class Reader:
    """One request: its inputs as arrays, and its answer of arrays."""

    def __init__(self, model: OipModel, request: pb.ModelInferRequest, regions: Regions, peer: str) -> None:
        self._model = model
        self._request = request
        self._regions = regions
        self._peer = peer
        self._wanted = self._outputs()

    def inputs(self) -> dict[str, Array]:
        """The inputs by name.

        Raises:
            InvalidArgument: one isn't the model's, comes twice, or has not its type, shape or size.
            NotFound: it is in a region that is not registered.
        """
        specs = {spec.name: spec for spec in self._model.inputs}
        raw = list(self._request.raw_input_contents)  # each access would copy
        unread: Iterator[bytes] = iter(raw)
        arrays: dict[str, Array] = {}
        for tensor in self._request.inputs:
            if tensor.name not in specs or tensor.name in arrays:
                allowed = f"each of {', '.join(specs)} at most once"
                raise InvalidArgument("inputs", tensor.name, allowed)
            check_shape(self._model, specs[tensor.name], tensor.shape, tensor.datatype)
            arrays[tensor.name] = self._input(tensor, unread, bool(raw))
        if next(unread, None) is not None:
            raise InvalidArgument("raw_input_contents", f"{len(raw)} entries", "one for each input without a region")
        return arrays

    def _input(self, tensor: Any, unread: Iterator[bytes], raw: bool) -> Array:
        field, shape = f"inputs[{tensor.name!r}]", list(tensor.shape)
        where = values_of(tensor.parameters)
        if _REGION in where:
            require_near(self._peer)
            region = self._regions.get(str(where[_REGION]))
            data = region.read(_whole(where, _OFFSET), _whole(where, _SIZE))
            return from_bytes(data, tensor.datatype, shape, field)
        if raw:
            if tensor.HasField("contents"):
                raise InvalidArgument(f"{field}.contents", "given", "absent where raw_input_contents is given")
            given = next(unread, None)
            if given is None:
                raise InvalidArgument("raw_input_contents", "too few", "one entry for each input without a region")
            return from_bytes(given, tensor.datatype, shape, field)
        kind = DTYPES[tensor.datatype][1]
        if not kind:
            raise InvalidArgument(f"{field}.contents", tensor.datatype, "raw: it has no typed contents")
        return from_contents(list(getattr(tensor.contents, kind)), tensor.datatype, shape, field)

    def _outputs(self) -> dict[str, dict[str, Any]]:
        """Which outputs are wanted, each once, with its parameters; none named: all."""
        known = [spec.name for spec in self._model.outputs]
        wanted: dict[str, dict[str, Any]] = {}
        for one in self._request.outputs:
            if one.name not in known:
                raise InvalidArgument("outputs", one.name, ", ".join(known))
            wanted.setdefault(one.name, self._checked(one.name, values_of(one.parameters)))
        return wanted or {name: {} for name in known}

    def _checked(self, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters of an output, before there is any work for what can't be."""
        if "classification" in parameters:
            k, field = _whole(parameters, "classification"), f"outputs[{name!r}].parameters['classification']"
            if not self._model.labels and k:
                raise InvalidArgument(field, k, f"absent: model {self._model.name!r} has no classes")
            if not 0 <= k <= MAX_CLASSES:
                raise InvalidArgument(field, k, f"0 to {MAX_CLASSES}")
        return parameters

    async def response(self, made: Arrays) -> pb.ModelInferResponse:
        """The outputs that are wanted and were made, each with a raw entry, which is empty where a region has it."""
        response = pb.ModelInferResponse(model_name=self._model.name, model_version=VERSION, id=self._request.id)
        for name, parameters in self._wanted.items():
            if name not in made:
                continue
            array = made[name]
            if (k := _whole(parameters, "classification")) > 0:
                array = await asyncio.to_thread(classified, array, k, self._labels(made))
            told = response.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
            data = to_bytes(array)
            response.raw_output_contents.append(b"" if self._placed(parameters, data, told) else data)
        return response

    def _labels(self, made: Arrays) -> Sequence[str]:
        return [label.decode() for label in made[self._model.labels]] if self._model.labels in made else ()

    def _placed(self, parameters: Mapping[str, Any], data: bytes, told: Any) -> bool:
        """Whether the output has gone to the client's region."""
        if _REGION not in parameters:
            return False
        require_near(self._peer)
        region, size = self._regions.get(str(parameters[_REGION])), _whole(parameters, _SIZE)
        if len(data) > size:
            raise MeshError(f"output {told.name!r} has {len(data)} bytes, but its place has {size}")
        region.check(_whole(parameters, _OFFSET), size)
        region.write(_whole(parameters, _OFFSET), data)
        told.parameters[_REGION].string_param = region.name
        told.parameters[_SIZE].int64_param = len(data)
        if offset := _whole(parameters, _OFFSET):
            told.parameters[_OFFSET].int64_param = offset
        return True


def model_metadata(model: OipModel) -> pb.ModelMetadataResponse:
    """Shapes with the batch."""
    told = pb.ModelMetadataResponse(name=model.name, versions=[VERSION], platform="imagemesh")
    for specs, tensors in ((model.inputs, told.inputs), (model.outputs, told.outputs)):
        for spec in specs:
            tensors.add(name=spec.name, datatype=spec.datatype, shape=model.shape(spec))
    return told


def model_config(model: OipModel) -> model_config_pb2.ModelConfig:
    """Dims without the batch, as Triton's configurations have them."""
    config = model_config_pb2.ModelConfig(
        name=model.name, platform="imagemesh", backend="imagemesh", max_batch_size=model.max_batch
    )
    config.version_policy.latest.num_versions = 1
    for spec in model.inputs:
        config.input.add(name=spec.name, data_type=_type(spec), dims=spec.dims, optional=spec.optional)
    for spec in model.outputs:
        config.output.add(name=spec.name, data_type=_type(spec), dims=spec.dims)
    config.model_transaction_policy.decoupled = model.decoupled
    return config


def _type(spec: TensorSpec) -> int:
    name = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return int(model_config_pb2.DataType.Value(f"TYPE_{name}"))


def model_statistics(model: OipModel) -> pb.ModelStatistics:
    """What the model has done; what it waited is inside the inference."""
    known = model.statistics
    told = pb.ModelStatistics(
        name=model.name, version=VERSION, last_inference=known.last, inference_count=known.items,
        execution_count=known.executions,
    )  # fmt: skip
    for name in ("success", "fail", "compute_input", "compute_infer", "compute_output"):
        _fill(getattr(told.inference_stats, name), getattr(known, name))
    _fill(told.inference_stats.queue, Times(known.success.count, 0))
    for batch, (read, infer, write) in sorted(known.by_batch.items()):
        one = told.batch_stats.add(batch_size=batch)
        for place, times in ((one.compute_input, read), (one.compute_infer, infer), (one.compute_output, write)):
            _fill(place, times)
    return told


def _fill(place: Any, times: Times) -> None:
    place.count, place.ns = times.count, times.ns


def one_string(arrays: Arrays, name: str, default: str = "") -> str:
    """The only element of a BYTES input, as text.

    Raises:
        InvalidArgument: it isn't UTF-8.
    """
    if name not in arrays:
        return default
    try:
        return bytes(arrays[name].reshape(-1)[0]).decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"inputs[{name!r}]", arrays[name].reshape(-1)[0], "UTF-8") from error


def strings(texts: Sequence[str]) -> Array:
    """A BYTES tensor."""
    array = np.empty(len(texts), dtype=np.object_)
    array[:] = [text.encode() for text in texts]
    return array
