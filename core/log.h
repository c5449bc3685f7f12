/* core/log.h - messages go to a callback that the caller owns; without one they go nowhere. */
#ifndef RF_CORE_LOG_H
#define RF_CORE_LOG_H

#include "core/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { RF_LOG_ERROR = 0, RF_LOG_WARN, RF_LOG_INFO, RF_LOG_DEBUG } rf_log_level;

typedef struct {
    void (*write)(void *user, rf_log_level level, const char *line); /* NULL: silent */
    void *user;
    rf_log_level level; /* lines above this level are not formatted */
} rf_log;

/* log may be NULL. One line without newline; formatted in a stack buffer of 1024 bytes. */
void rf_log_write(const rf_log *log, rf_log_level level, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

#ifdef __cplusplus
}
#endif
#endif
