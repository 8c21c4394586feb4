"""Socket types of the pack. The names are in users' files: they never change."""

from comfy_api.latest import io

# samplers.inversion.Inversion
Inversion = io.Custom("INVERSION")
# Integer tensor [B, H, W]: the region of every position.
LabelMap = io.Custom("LABEL_MAP")
# attention.regions.SemanticMap
SemanticMap = io.Custom("SEMANTIC_MAP")
# samplers.guidance.Energy
Energy = io.Custom("ENERGY")
