/* caching/features/features.h - the policies for denoisers; one file each. */
#ifndef RF_CACHING_FEATURES_FEATURES_H
#define RF_CACHING_FEATURES_FEATURES_H

#include "caching/policy.h"

/* step level */
extern const rf_policy_def rf_policy_interval;
extern const rf_policy_def rf_policy_teacache;
extern const rf_policy_def rf_policy_easycache;
extern const rf_policy_def rf_policy_magcache;
extern const rf_policy_def rf_policy_spectrum;
extern const rf_policy_def rf_policy_adacache;
extern const rf_policy_def rf_policy_worldcache;
/* block level */
extern const rf_policy_def rf_policy_fbcache;
extern const rf_policy_def rf_policy_dbcache;
extern const rf_policy_def rf_policy_deltacache;
/* part level */
extern const rf_policy_def rf_policy_fora;
extern const rf_policy_def rf_policy_taylorseer;
extern const rf_policy_def rf_policy_hicache;
extern const rf_policy_def rf_policy_speca;
extern const rf_policy_def rf_policy_pab;
/* token level */
extern const rf_policy_def rf_policy_toca;
extern const rf_policy_def rf_policy_duca;
extern const rf_policy_def rf_policy_diffsparse;
/* a recorded schedule */
extern const rf_policy_def rf_policy_replay;
/* a recorder */
extern const rf_policy_def rf_policy_measure;

#endif
