import json
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from utils.sharding import named_sharding, partition_spec


def mesh_of(*axes):
    return jax.make_mesh((1,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes))


def test_spec_follows_the_table():
    mesh = mesh_of("data", "fsdp", "tensor", "sequence")
    assert partition_spec("VD", mesh) == PartitionSpec("tensor", "fsdp")
    assert partition_spec("LDNH", mesh) == PartitionSpec(None, "fsdp", "tensor", None)
    assert partition_spec("LKH", mesh) == PartitionSpec(None, "tensor", None)
    assert partition_spec("LFD", mesh) == PartitionSpec(None, "tensor", "fsdp")
    assert partition_spec("D", mesh) == PartitionSpec("fsdp")


def test_axes_that_the_mesh_lacks_are_left_out():
    assert partition_spec("LDNH", mesh_of("data")) == PartitionSpec(None, None, None, None)
    assert partition_spec("VD", mesh_of("data", "tensor")) == PartitionSpec("tensor", None)


@pytest.mark.parametrize(
    ("letters", "message"),
    [("LQ", "no sharding rule for Q of the shape LQ"), ("FN", "F and N .* both lie on the mesh axis 'tensor'")],
)
def test_refused_shapes(letters, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(letters, mesh_of("fsdp", "tensor"))


def test_letters_must_fit_the_shape():
    with pytest.raises(ValueError, match=r"letters DF do not fit the shape \(2, 3, 4\)"):
        named_sharding("DF", (2, 3, 4), mesh_of("fsdp"))


SCRIPT = """
import jax, json
from jax.sharding import AxisType
from utils.sharding import named_sharding
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
said = []
for letters, shape in (("DKH", (6, 8, 5)), ("DKH", (6, 2, 5)), ("VD", (8, 7))):
    try:
        said.append(list(named_sharding(letters, shape, mesh).shard_shape(shape)))
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_uneven_dimensions_are_refused_with_their_numbers():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    even, few_heads, odd_width = json.loads(done.stdout)
    assert even == [3, 2, 5]
    assert "dimension K of size 2" in few_heads and "4 devices" in few_heads and "'tensor'" in few_heads
    assert "dimension D of size 7" in odd_width and "2 devices" in odd_width and "'fsdp'" in odd_width
