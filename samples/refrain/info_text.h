/* samples/refrain/info_text.h - `refrain info` of a text model, from its config, tokenizer and the headers of its weights. */
#ifndef REFRAIN_INFO_TEXT_H
#define REFRAIN_INFO_TEXT_H

#include "core/status.h"

rf_status info_text(const char *dir, bool json, rf_error *err);

#endif
