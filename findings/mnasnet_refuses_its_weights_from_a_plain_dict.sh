#!/usr/bin/env bash
# torchvision 0.29.2 with torch 2.15.0: MNASNet refuses its own weights if they come as a plain dict, so none of its
# checkpoints survives a trip through safetensors.
#
# Guess: load_state_dict takes any mapping from names to tensors of the right names and shapes, so
# network.load_state_dict(dict(network.state_dict())) works for every network of torchvision. It does for the others
# tried here, which also have batch norms.
#
# Seen: it raises. MNASNet looks for a version number in the hidden attribute _metadata of the state dict, to tell
# weights with a wrong number of channels from before; a plain dict has no such attribute, and neither has what
# safetensors.torch.load_file returns. Instead of assuming the present version, as batch norms do, it stops with a
# message about a setting that the user never made.
#
# Output seen:
#   resnet18 loads a plain dict
#   shufflenet_v2_x0_5 loads a plain dict
#   mnasnet0_5 refuses a plain dict: version should be set to 1 or 2 instead of None
#   mnasnet0_5 loads its weights out of safetensors once the metadata is copied over
#
# Why it surprises: names, shapes and values are right and strict loading has nothing to complain about; the state dict
# carries state that its type does not show. Giving the dict the network's own state_dict()._metadata avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.15.0 torchvision==0.29.2 "safetensors[torch]==0.6.2" packaging==25.0 numpy==2.4.6
cat > "$folder/plain.py" <<'PYTHON'
from collections import OrderedDict

from safetensors.torch import load_file, save_file
from torchvision import models


def load(name):
    network = getattr(models, name)()
    network.load_state_dict(dict(network.state_dict()))


for name in ("resnet18", "shufflenet_v2_x0_5"):
    load(name)
    print(f"{name} loads a plain dict")
try:
    load("mnasnet0_5")
except ValueError as error:
    print(f"mnasnet0_5 refuses a plain dict: {error}")
else:
    raise SystemExit("mnasnet0_5 now loads a plain dict")
network = models.mnasnet0_5()
save_file(network.state_dict(), "mnasnet.safetensors")
read = OrderedDict(load_file("mnasnet.safetensors"))
read._metadata = network.state_dict()._metadata
network.load_state_dict(read)
print("mnasnet0_5 loads its weights out of safetensors once the metadata is copied over")
PYTHON
cd "$folder" && "$folder/venv/bin/python" plain.py | tee out.txt
grep -q "^mnasnet0_5 refuses a plain dict: version should be set to 1 or 2 instead of None$" out.txt
grep -q "^resnet18 loads a plain dict$" out.txt
grep -q "^shufflenet_v2_x0_5 loads a plain dict$" out.txt
