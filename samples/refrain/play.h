/* samples/refrain/play.h - `refrain world --play`. world_run.h has world_play. */
#ifndef REFRAIN_PLAY_H
#define REFRAIN_PLAY_H

#include "core/status.h"

/* Can there be a game here? Before anything is loaded. */
rf_status play_check(rf_error *err);

#endif
