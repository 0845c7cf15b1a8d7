// Packing: rows as a file stores them into panels.
#pragma once

#include "formats.h"

namespace ayllu {

// Bytes of one stored row.
size_t source_row_bytes(int format, int cols);
// Whether rows of so many numbers fill whole stored blocks.
bool fits_source(int format, int cols);
// Panel `panel` of m, from its first row at `rows`, rows `stride` bytes apart. Writes m.panel_bytes at out.
void pack_panel(const Matrix& m, const uint8_t* rows, size_t stride, int panel, uint8_t* out);

}  // namespace ayllu
