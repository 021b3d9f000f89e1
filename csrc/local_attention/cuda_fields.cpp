#include <cstddef>

#include "common/dtype_info.h"
#include "local_attention/cuda_plan.h"

namespace ca3d {
namespace {

#define CA3D_FIELD(member, type, meaning) \
  fields.push_back({#member, offsetof(LocalAttentionArguments, member), type, meaning})

void add_rows(std::vector<ArgumentField>* fields, const std::string& name, size_t offset,
              const std::string& stored, const std::string& meaning) {
  const std::string shape = " (outer, inner, heads, T, head_dim)";
  fields->push_back(
      {name + ".data", offset + offsetof(StridedRows, data), stored + "*", meaning + shape});
  const char* dimensions[] = {"outer", "inner", "head", "frame"};
  for (int i = 0; i < 4; ++i) {
    fields->push_back({name + "." + dimensions[i], offset + sizeof(void*) * (i + 1), "int64_t",
                       std::string("stride of dimension ") + dimensions[i] + ", in elements"});
  }
}

void add_divider(std::vector<ArgumentField>* fields, const std::string& name, size_t offset,
                 const std::string& meaning) {
  const char* about = "see common/divider.h";
  fields->push_back({name + ".divisor", offset + offsetof(Divider, divisor), "uint32_t", meaning});
  fields->push_back(
      {name + ".multiplier", offset + offsetof(Divider, multiplier), "uint32_t", about});
  fields->push_back({name + ".shift", offset + offsetof(Divider, shift), "uint32_t", about});
}

}  // namespace

std::vector<ArgumentField> argument_fields(const LocalAttentionLaunch& launch) {
  static_assert(offsetof(StridedRows, frame) == 4 * sizeof(void*), "strides follow the address");
  std::vector<ArgumentField> fields;
  const std::string stored = dtype_name(launch.dtype);
  const auto rows = [&](const char* name, size_t offset, const char* meaning) {
    add_rows(&fields, name, offset, stored, meaning);
  };
  rows("q", offsetof(LocalAttentionArguments, q), "queries");
  rows("k", offsetof(LocalAttentionArguments, k), "keys");
  rows("v", offsetof(LocalAttentionArguments, v), "values");
  if (launch.backward) {
    rows("go", offsetof(LocalAttentionArguments, go), "gradient of the output");
    rows("dq", offsetof(LocalAttentionArguments, dq), "written: gradient of q");
    rows("dk", offsetof(LocalAttentionArguments, dk), "written: gradient of k");
    rows("dv", offsetof(LocalAttentionArguments, dv), "written: gradient of v");
  } else {
    rows("o", offsetof(LocalAttentionArguments, o), "written: output");
  }
  CA3D_FIELD(scale, "double", "factor of the logits");
  CA3D_FIELD(window.kernel_size, "int64_t", "slots of a window");
  CA3D_FIELD(window.dilation, "int64_t", "always 1: windows are those of positions");
  CA3D_FIELD(window.causal, "bool", "whether a window ends at its query");
  CA3D_FIELD(window.edge, "int32_t", "0 truncate, 1 zero, 2 shift");
  CA3D_FIELD(dilation, "int64_t", "distance of neighbouring slots in frames");
  CA3D_FIELD(longest, "int32_t", "positions of a sequence of the first full_phases phases");
  CA3D_FIELD(full_phases, "int32_t", "sequences of later phases have one position less");
  CA3D_FIELD(head_dim, "int32_t", "elements of a row");
  CA3D_FIELD(lanes, "int32_t", "threads that share a row, a power of two");
  CA3D_FIELD(lane_shift, "int32_t", "its exponent");
  CA3D_FIELD(units, "int32_t", "sequences of one head and one phase of the dilation");
  CA3D_FIELD(units_per_block, "int32_t", "of these, how many a block takes");
  CA3D_FIELD(slots, "int32_t", "most rows that a query sees");
  CA3D_FIELD(tile, "int32_t", "positions whose results a block writes");
  CA3D_FIELD(has_table, "int32_t", "whether there is a key table");
  add_divider(&fields, "tiles", offsetof(LocalAttentionArguments, tiles), "tiles of a sequence");
  add_divider(&fields, "heads", offsetof(LocalAttentionArguments, heads), "heads");
  add_divider(&fields, "phases", offsetof(LocalAttentionArguments, phases),
              "phases of the dilation");
  add_divider(&fields, "inner", offsetof(LocalAttentionArguments, inner), "size of inner");
  add_divider(&fields, "query_rows", offsetof(LocalAttentionArguments, query_rows),
              "room for the queries of a unit");
  add_divider(&fields, "key_rows", offsetof(LocalAttentionArguments, key_rows),
              "room for the keys of a unit");
  CA3D_FIELD(table, "KeyTable", "the key table and its inverse, see local_attention/cuda_plan.h");
  return fields;
}

}  // namespace ca3d
