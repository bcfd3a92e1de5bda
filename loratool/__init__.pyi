__version__: str

from .adapter.adapter import Adapter as Adapter, Change as Change
from .adapter.load import load as load
from .adapter.strengths import Strength as Strength
from .errors import LoratoolError as LoratoolError
from .files.hub import fetched as fetched
from .files.tensors import Checkpoint as Checkpoint
from .numbers.ranks import Budget as Budget, Rule as Rule
from .verbs.check.check import CheckReport as CheckReport, check as check
from .verbs.check.fix import fix as fix
from .verbs.combine.combine import (
    CombineOptions as CombineOptions,
    CombineReport as CombineReport,
    Part as Part,
    combine as combine,
)
from .verbs.compare.compare import CompareOptions as CompareOptions, compare as compare, compare_to as compare_to
from .verbs.convert import ConvertReport as ConvertReport, convert as convert
from .verbs.delta.delta import (
    DeltaOptions as DeltaOptions,
    DeltaReport as DeltaReport,
    delta as delta,
    iter_deltas as iter_deltas,
)
from .verbs.edit.edit import EditOptions as EditOptions, EditReport as EditReport, edit as edit
from .verbs.extract.extract import ExtractOptions as ExtractOptions, ExtractReport as ExtractReport, extract as extract
from .verbs.hash import Hashes as Hashes, file_hashes as file_hashes
from .verbs.inspect.block_map import Map as Map, map_of as map_of
from .verbs.inspect.inspect import AdapterReport as AdapterReport, CheckpointReport as CheckpointReport, inspect as inspect
from .verbs.merge.merge import MergeReport as MergeReport, merge as merge
from .verbs.merge.write import Options as Options, Source as Source
from .verbs.meta.meta import (
    MetaReport as MetaReport,
    copy_metadata as copy_metadata,
    delete_metadata as delete_metadata,
    metadata_of as metadata_of,
    set_metadata as set_metadata,
    strip_metadata as strip_metadata,
)
from .verbs.report.report import PageReport as PageReport, report as report
from .verbs.resize import (
    FrontierReport as FrontierReport,
    LowRankReport as LowRankReport,
    frontier as frontier,
    resize as resize,
    to_lora as to_lora,
)
from .verbs.swap import swap as swap
from .verbs.unmerge.unmerge import UnmergeReport as UnmergeReport, unmerge as unmerge
