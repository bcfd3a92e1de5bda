__version__: str

from .adapter.adapter import Adapter as Adapter
from .adapter.adapter import Assumptions as Assumptions
from .adapter.adapter import Change as Change
from .adapter.approximate import ApproximatedModule as ApproximatedModule
from .adapter.load import load as load
from .adapter.selection import Selection as Selection
from .adapter.strengths import Strength as Strength
from .adapter.strengths import WeightedAdapter as WeightedAdapter
from .base.base import BaseCheckpoint as BaseCheckpoint
from .deltas.base import Delta as Delta
from .errors import LoratoolError as LoratoolError
from .files.adapter_files import AdapterFile as AdapterFile
from .files.header import Header as Header
from .files.header import JsonFile as JsonFile
from .files.header import TensorInfo as TensorInfo
from .files.hub import fetch as fetch
from .files.tensors import Checkpoint as Checkpoint
from .keys.detect import Detection as Detection
from .names import Module as Module
from .numbers.ranks import Budget as Budget
from .numbers.ranks import Rule as Rule
from .verbs.check.check import CheckReport as CheckReport
from .verbs.check.check import Finding as Finding
from .verbs.check.check import check as check
from .verbs.check.fix import fix as fix
from .verbs.combine.combine import CombineReport as CombineReport
from .verbs.combine.combine import combine as combine
from .verbs.compare.adapters import ModuleComparison as ModuleComparison
from .verbs.compare.checkpoints import CheckpointComparison as CheckpointComparison
from .verbs.compare.checkpoints import TensorDifference as TensorDifference
from .verbs.compare.compare import (
    AdapterComparison as AdapterComparison,
)
from .verbs.compare.compare import (
    MatrixComparison as MatrixComparison,
)
from .verbs.compare.compare import (
    compare as compare,
)
from .verbs.compare.compare import (
    compare_to as compare_to,
)
from .verbs.compare.merges import MergeComparison as MergeComparison
from .verbs.compare.merges import Mismatch as Mismatch
from .verbs.convert import ConvertReport as ConvertReport
from .verbs.convert import convert as convert
from .verbs.delta.delta import DeltaReport as DeltaReport
from .verbs.delta.delta import delta as delta
from .verbs.delta.delta import iter_deltas as iter_deltas
from .verbs.delta.measure import ModuleMeasure as ModuleMeasure
from .verbs.edit.edit import BlockShare as BlockShare
from .verbs.edit.edit import EditedModule as EditedModule
from .verbs.edit.edit import EditReport as EditReport
from .verbs.edit.edit import edit as edit
from .verbs.extract.extract import ExtractReport as ExtractReport
from .verbs.extract.extract import OmittedChange as OmittedChange
from .verbs.extract.extract import extract as extract
from .verbs.extract.outcomes import ExtractedModule as ExtractedModule
from .verbs.hash import Hashes as Hashes
from .verbs.hash import hash_file as hash_file
from .verbs.inspect.block_map import BlockMap as BlockMap
from .verbs.inspect.block_map import block_map as block_map
from .verbs.inspect.inspect import (
    AdapterReport as AdapterReport,
)
from .verbs.inspect.inspect import (
    CheckpointReport as CheckpointReport,
)
from .verbs.inspect.inspect import (
    ModuleReport as ModuleReport,
)
from .verbs.inspect.inspect import (
    inspect as inspect,
)
from .verbs.inspect.values import ModuleValues as ModuleValues
from .verbs.merge.merge import MergeReport as MergeReport
from .verbs.merge.merge import merge as merge
from .verbs.meta.meta import (
    MetaReport as MetaReport,
)
from .verbs.meta.meta import (
    copy_metadata as copy_metadata,
)
from .verbs.meta.meta import (
    delete_metadata as delete_metadata,
)
from .verbs.meta.meta import (
    read_metadata as read_metadata,
)
from .verbs.meta.meta import (
    set_metadata as set_metadata,
)
from .verbs.meta.meta import (
    strip_metadata as strip_metadata,
)
from .verbs.report.report import PageReport as PageReport
from .verbs.report.report import report as report
from .verbs.resize import (
    FrontierPoint as FrontierPoint,
)
from .verbs.resize import (
    FrontierReport as FrontierReport,
)
from .verbs.resize import (
    ResizeReport as ResizeReport,
)
from .verbs.resize import (
    frontier as frontier,
)
from .verbs.resize import (
    resize as resize,
)
from .verbs.resize import (
    to_lora as to_lora,
)
from .verbs.swap import swap as swap
from .verbs.unmerge.unmerge import UnmergeReport as UnmergeReport
from .verbs.unmerge.unmerge import unmerge as unmerge
