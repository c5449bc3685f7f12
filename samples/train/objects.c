/* samples/train/objects.c - the renderer of objects.h. Compiles as C, and as CUDA when objects.cu includes it.
 *
 * Method   One ray per sample. The floor is the plane y = 0, met in closed form. The object is a signed distance field,
 *          sphere-traced in its own coordinates inside its bounding sphere; a ray that misses that sphere costs nothing.
 *          Light: one soft-shadowed lamp, a sky gradient, light returned by the floor, ambient occlusion from the field.
 *          Gold and chrome mirror floor and sky (one bounce, no self-reflection).
 * Units    The object is about 2 units across before scaling, y points up, angles are radians, colours are linear RGB
 *          until tone_map.
 * Pitfall  Every random number has its own slot (enum slot). Renumbering slots changes all pictures. */
#include "objects.h"

#include <math.h>
#include <stddef.h>

#ifdef __CUDACC__
#define OBJ_FN static __host__ __device__ __forceinline__
#else
#define OBJ_FN static inline
#endif

enum shape { SHAPE_CUBE, SHAPE_SPHERE, SHAPE_CYLINDER, SHAPE_CONE, SHAPE_TORUS, SHAPE_STAR };
enum material { MAT_RED, MAT_GREEN, MAT_BLUE, MAT_PURPLE, MAT_GOLD, MAT_CHROME };
enum floor_pattern { FLOOR_PLAIN, FLOOR_CHECKER, FLOOR_STRIPES };

const char *obj_class_name(int class_id) {
    static const char *const names[OBJ_NUM_CLASSES] = {
        "cube-red",     "cube-green",     "cube-blue",     "cube-purple",     "cube-gold",     "cube-chrome",
        "sphere-red",   "sphere-green",   "sphere-blue",   "sphere-purple",   "sphere-gold",   "sphere-chrome",
        "cylinder-red", "cylinder-green", "cylinder-blue", "cylinder-purple", "cylinder-gold", "cylinder-chrome",
        "cone-red",     "cone-green",     "cone-blue",     "cone-purple",     "cone-gold",     "cone-chrome",
        "torus-red",    "torus-green",    "torus-blue",    "torus-purple",    "torus-gold",    "torus-chrome",
        "star-red",     "star-green",     "star-blue",     "star-purple",     "star-gold",     "star-chrome",
    };
    return class_id >= 0 && class_id < OBJ_NUM_CLASSES ? names[class_id] : NULL;
}

/* ---- small vectors ---------------------------------------------------------------------------------------------- */

typedef struct {
    float x, y, z;
} vec3;

OBJ_FN vec3 v3(float x, float y, float z) {
    vec3 v;
    v.x = x;
    v.y = y;
    v.z = z;
    return v;
}
OBJ_FN vec3 add(vec3 a, vec3 b) {
    return v3(a.x + b.x, a.y + b.y, a.z + b.z);
}
OBJ_FN vec3 sub(vec3 a, vec3 b) {
    return v3(a.x - b.x, a.y - b.y, a.z - b.z);
}
OBJ_FN vec3 mul(vec3 a, vec3 b) {
    return v3(a.x * b.x, a.y * b.y, a.z * b.z);
}
OBJ_FN vec3 scale(vec3 a, float s) {
    return v3(a.x * s, a.y * s, a.z * s);
}
OBJ_FN vec3 along(vec3 origin, vec3 dir, float t) {
    return add(origin, scale(dir, t));
}
OBJ_FN vec3 mix3(vec3 a, vec3 b, float t) {
    return add(a, scale(sub(b, a), t));
}
OBJ_FN float dot3(vec3 a, vec3 b) {
    return a.x * b.x + a.y * b.y + a.z * b.z;
}
OBJ_FN vec3 cross3(vec3 a, vec3 b) {
    return v3(a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x);
}
OBJ_FN vec3 normalize3(vec3 a) {
    return scale(a, 1.0f / sqrtf(dot3(a, a)));
}
OBJ_FN float clampf(float x, float lo, float hi) {
    return fminf(fmaxf(x, lo), hi);
}
OBJ_FN float smooth(float lo, float hi, float x) {
    float t = clampf((x - lo) / (hi - lo), 0.0f, 1.0f);
    return t * t * (3.0f - 2.0f * t);
}
OBJ_FN float length2(float x, float y) {
    return sqrtf(x * x + y * y);
}

/* ---- the scene of one picture ----------------------------------------------------------------------------------- */

typedef struct {
    int shape, material, floor_pattern;
    /* world = center + object_scale * (axis_x * p.x + axis_y * p.y + axis_z * p.z), p in object coordinates */
    vec3 center, axis_x, axis_y, axis_z;
    float object_scale, bound_radius;
    vec3 eye, ray_forward, ray_right, ray_up; /* right and up already carry tan(fov / 2) */
    vec3 light_dir, light_color;
    float shadow_sharpness;
    vec3 floor_a, floor_b, sky_horizon, sky_zenith, base_color;
    float floor_cos, floor_sin, floor_shift_x, floor_shift_z, floor_period;
} scene;

enum slot {
    SLOT_AZIMUTH,
    SLOT_ELEVATION,
    SLOT_DISTANCE,
    SLOT_FOV,
    SLOT_FRAME_X,
    SLOT_FRAME_Y,
    SLOT_SCALE,
    SLOT_YAW,
    SLOT_TILT,
    SLOT_TILT_KIND,
    SLOT_LIGHT_SIDE,
    SLOT_LIGHT_TURN,
    SLOT_LIGHT_HEIGHT,
    SLOT_LIGHT_POWER,
    SLOT_LIGHT_WARMTH,
    SLOT_SHADOW,
    SLOT_FLOOR_KIND,
    SLOT_FLOOR_HUE,
    SLOT_FLOOR_VALUE,
    SLOT_FLOOR_CONTRAST,
    SLOT_FLOOR_TURN,
    SLOT_FLOOR_SHIFT_X,
    SLOT_FLOOR_SHIFT_Z,
    SLOT_FLOOR_PERIOD,
    SLOT_SKY_HUE,
    SLOT_SKY_VALUE,
    SLOT_TINT
};

/* The splitmix64 finaliser: every input bit reaches every output bit. */
OBJ_FN uint64_t scramble(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Uniform in [lo, hi): counter-based, one draw per slot. */
OBJ_FN float draw(uint64_t key, int slot, float lo, float hi) {
    uint64_t bits = scramble(key + 0x9e3779b97f4a7c15ull * (uint64_t)(slot + 1));
    return lo + (hi - lo) * ((float)(bits >> 40) * (1.0f / 16777216.0f));
}

OBJ_FN vec3 muted_color(float hue, float saturation, float value) {
    float r = 0.5f + 0.5f * cosf(6.2831853f * hue);
    float g = 0.5f + 0.5f * cosf(6.2831853f * (hue - 0.33333333f));
    float b = 0.5f + 0.5f * cosf(6.2831853f * (hue - 0.66666667f));
    return scale(v3(1.0f + saturation * (r - 1.0f), 1.0f + saturation * (g - 1.0f), 1.0f + saturation * (b - 1.0f)),
                 value);
}

/* Sizes in object coordinates; scene_make rests the object on the floor from the same numbers. */
#define CUBE_HALF       0.70f
#define SPHERE_RADIUS   0.92f
#define CYLINDER_RADIUS 0.60f
#define CYLINDER_HALF   0.82f
#define CONE_RADIUS     0.86f
#define CONE_HALF       0.88f
#define TORUS_RING      0.72f
#define TORUS_TUBE      0.29f
#define STAR_TIP        1.12f
#define STAR_NOTCH      0.50f
#define STAR_HALF       0.24f
#define ROUNDING        0.035f
#define COS36           0.80901699f
#define SIN36           0.58778525f
#define COS72           0.30901699f
#define SIN72           0.95105652f

OBJ_FN vec3 material_color(int material) {
    switch (material) {
    case MAT_RED: return v3(0.80f, 0.030f, 0.030f);
    case MAT_GREEN: return v3(0.035f, 0.48f, 0.060f);
    case MAT_BLUE: return v3(0.025f, 0.12f, 0.80f);
    case MAT_PURPLE: return v3(0.42f, 0.035f, 0.60f);
    case MAT_GOLD: return v3(1.00f, 0.62f, 0.13f);
    default: return v3(0.93f, 0.95f, 0.98f);
    }
}

OBJ_FN void scene_make(scene *s, uint64_t seed, uint64_t index, int class_id) {
    const float deg = 0.017453293f;
    uint64_t key = scramble(scramble(seed + 0x632be59bd9b4e019ull) + index);
    s->shape = class_id / OBJ_NUM_MATERIALS;
    s->material = class_id % OBJ_NUM_MATERIALS;

    /* How the object stands. `yaw` is relative to the camera, so that no cube is seen face-on and no star edge-on;
     * `tilt` turns about the object's x axis; `rest` is the height of its centre above the floor. */
    float yaw = 0.0f, tilt = 0.0f, rest = 0.0f, low_elevation = 14.0f, high_elevation = 38.0f;
    float yaw_draw = draw(key, SLOT_YAW, 0.0f, 1.0f), tilt_draw = draw(key, SLOT_TILT, 0.0f, 1.0f);
    int rare = draw(key, SLOT_TILT_KIND, 0.0f, 1.0f) < 0.3f;
    switch (s->shape) {
    case SHAPE_CUBE:
        yaw = (20.0f + 50.0f * yaw_draw) * deg;
        low_elevation = 18.0f;
        rest = CUBE_HALF;
        s->bound_radius = 1.7320508f * CUBE_HALF;
        break;
    case SHAPE_SPHERE:
        rest = SPHERE_RADIUS;
        s->bound_radius = SPHERE_RADIUS;
        break;
    case SHAPE_CYLINDER: /* a third of them lie on their side, axis askew to the view so that an end shows */
        low_elevation = 18.0f;
        tilt = rare ? 90.0f * deg : 0.0f;
        yaw = (yaw_draw < 0.5f ? -60.0f + 60.0f * yaw_draw : 60.0f * yaw_draw) * deg;
        rest = rare ? CYLINDER_RADIUS : CYLINDER_HALF;
        s->bound_radius = 1.02f;
        break;
    case SHAPE_CONE:
        rest = CONE_HALF;
        s->bound_radius = 1.235f;
        break;
    case SHAPE_TORUS: /* flat with the hole in view, or leaning towards the camera */
        low_elevation = 26.0f;
        high_elevation = 48.0f;
        yaw = (-40.0f + 80.0f * yaw_draw) * deg;
        tilt = rare ? (25.0f + 35.0f * tilt_draw) * deg : 0.0f;
        rest = TORUS_RING * sinf(tilt) + TORUS_TUBE;
        s->bound_radius = TORUS_RING + TORUS_TUBE;
        break;
    default: /* the star stands on two tips, leaning back a little */
        yaw = (-42.0f + 84.0f * yaw_draw) * deg;
        tilt = -(4.0f + 22.0f * tilt_draw) * deg;
        high_elevation = 32.0f;
        rest = STAR_TIP * COS36 * cosf(tilt) - STAR_HALF * sinf(tilt);
        s->bound_radius = 1.15f;
        break;
    }
    s->object_scale = draw(key, SLOT_SCALE, 0.88f, 1.08f);

    /* The camera circles the object; a small shift of the target moves the object in the frame. */
    float azimuth = draw(key, SLOT_AZIMUTH, 0.0f, 6.2831853f);
    float elevation = draw(key, SLOT_ELEVATION, low_elevation, high_elevation) * deg;
    float fov = draw(key, SLOT_FOV, 30.0f, 42.0f) * deg, tan_half = tanf(0.5f * fov);
    float distance = draw(key, SLOT_DISTANCE, 1.50f, 1.80f) / tan_half;
    vec3 to_eye = v3(cosf(elevation) * sinf(azimuth), sinf(elevation), cosf(elevation) * cosf(azimuth));
    vec3 right = v3(cosf(azimuth), 0.0f, -sinf(azimuth));
    vec3 up = cross3(to_eye, right);
    s->center = v3(0.0f, rest * s->object_scale, 0.0f);
    vec3 target = add(s->center, add(scale(right, draw(key, SLOT_FRAME_X, -0.18f, 0.18f)),
                                     scale(up, draw(key, SLOT_FRAME_Y, -0.14f, 0.18f))));
    s->eye = along(target, to_eye, distance);
    s->ray_forward = scale(to_eye, -1.0f);
    s->ray_right = scale(right, tan_half);
    s->ray_up = scale(up, tan_half);

    float turn = azimuth + yaw, ct = cosf(tilt), st = sinf(tilt);
    vec3 side = v3(cosf(turn), 0.0f, -sinf(turn)), front = v3(sinf(turn), 0.0f, cosf(turn));
    s->axis_x = side;
    s->axis_y = add(v3(0.0f, ct, 0.0f), scale(front, st));
    s->axis_z = add(v3(0.0f, -st, 0.0f), scale(front, ct));

    /* The lamp stands to one side of the camera, never behind the object, so that the lit side shows. */
    float light_turn = draw(key, SLOT_LIGHT_TURN, 22.0f, 75.0f) * deg;
    float light_azimuth = azimuth + (draw(key, SLOT_LIGHT_SIDE, 0.0f, 1.0f) < 0.5f ? -light_turn : light_turn);
    float light_height = draw(key, SLOT_LIGHT_HEIGHT, 36.0f, 62.0f) * deg;
    s->light_dir =
        v3(cosf(light_height) * sinf(light_azimuth), sinf(light_height), cosf(light_height) * cosf(light_azimuth));
    float warmth = draw(key, SLOT_LIGHT_WARMTH, -0.06f, 0.10f);
    s->light_color = scale(v3(1.0f + warmth, 1.0f, 1.0f - warmth), draw(key, SLOT_LIGHT_POWER, 0.95f, 1.35f));
    s->shadow_sharpness = draw(key, SLOT_SHADOW, 7.0f, 18.0f);

    float kind = draw(key, SLOT_FLOOR_KIND, 0.0f, 1.0f);
    s->floor_pattern = kind < 0.34f ? FLOOR_PLAIN : kind < 0.70f ? FLOOR_CHECKER : FLOOR_STRIPES;
    float hue = draw(key, SLOT_FLOOR_HUE, 0.0f, 1.0f), value = draw(key, SLOT_FLOOR_VALUE, 0.24f, 0.50f);
    s->floor_a = muted_color(hue, 0.30f, value);
    s->floor_b = scale(muted_color(hue + 0.08f, 0.22f, value), draw(key, SLOT_FLOOR_CONTRAST, 0.36f, 0.60f));
    float floor_turn = draw(key, SLOT_FLOOR_TURN, 0.0f, 6.2831853f);
    s->floor_cos = cosf(floor_turn);
    s->floor_sin = sinf(floor_turn);
    s->floor_shift_x = draw(key, SLOT_FLOOR_SHIFT_X, 0.0f, 4.0f);
    s->floor_shift_z = draw(key, SLOT_FLOOR_SHIFT_Z, 0.0f, 4.0f);
    s->floor_period = draw(key, SLOT_FLOOR_PERIOD, 0.70f, 1.15f);

    float sky_hue = draw(key, SLOT_SKY_HUE, 0.0f, 1.0f), sky_value = draw(key, SLOT_SKY_VALUE, 0.55f, 0.85f);
    s->sky_horizon = muted_color(sky_hue, 0.16f, sky_value);
    s->sky_zenith = muted_color(sky_hue, 0.42f, 0.40f * sky_value);
    s->base_color = scale(material_color(s->material), draw(key, SLOT_TINT, 0.88f, 1.10f));
}

/* ---- distance fields, object coordinates ------------------------------------------------------------------------ */

/* Where two half-spaces (signed distances a, b) meet, with a rounded edge. Never more than the true distance as long as
 * their outward normals are at least 90 degrees apart, which holds for every edge below. */
OBJ_FN float meet(float a, float b) {
    a += ROUNDING;
    b += ROUNDING;
    return fminf(fmaxf(a, b), 0.0f) + length2(fmaxf(a, 0.0f), fmaxf(b, 0.0f)) - ROUNDING;
}

/* Signed distance to a five-pointed star with one tip on +y. Mirror symmetry folds the plane into the 36 degrees
 * between that tip and the notch beside it; there the outline is a single segment. */
OBJ_FN float star_2d(float x, float y) {
    x = fabsf(x);
    float over = fmaxf(x * COS72 - y * SIN72, 0.0f); /* beyond the mirror at 72 degrees from +y */
    x -= 2.0f * over * COS72;
    y += 2.0f * over * SIN72;
    x = fabsf(x);
    over = fmaxf(x * COS36 - y * SIN36, 0.0f); /* beyond the mirror at 36 degrees */
    x -= 2.0f * over * COS36;
    y += 2.0f * over * SIN36;
    const float edge_x = STAR_NOTCH * SIN36, edge_y = STAR_NOTCH * COS36 - STAR_TIP;
    const float edge_sq = edge_x * edge_x + edge_y * edge_y;
    float px = x, py = y - STAR_TIP;
    float t = clampf((px * edge_x + py * edge_y) / edge_sq, 0.0f, 1.0f);
    float d = length2(px - t * edge_x, py - t * edge_y);
    return px * edge_y - py * edge_x > 0.0f ? -d : d;
}

OBJ_FN float object_distance(int shape, vec3 p) {
    switch (shape) {
    case SHAPE_CUBE: {
        const float half = CUBE_HALF - ROUNDING;
        float x = fabsf(p.x) - half, y = fabsf(p.y) - half, z = fabsf(p.z) - half;
        vec3 out = v3(fmaxf(x, 0.0f), fmaxf(y, 0.0f), fmaxf(z, 0.0f));
        return sqrtf(dot3(out, out)) + fminf(fmaxf(x, fmaxf(y, z)), 0.0f) - ROUNDING;
    }
    case SHAPE_SPHERE: return sqrtf(dot3(p, p)) - SPHERE_RADIUS;
    case SHAPE_CYLINDER: return meet(length2(p.x, p.z) - CYLINDER_RADIUS, fabsf(p.y) - CYLINDER_HALF);
    case SHAPE_CONE: {
        const float slope = sqrtf(4.0f * CONE_HALF * CONE_HALF + CONE_RADIUS * CONE_RADIUS);
        float side = (length2(p.x, p.z) * 2.0f * CONE_HALF + (p.y - CONE_HALF) * CONE_RADIUS) / slope;
        return meet(side, -CONE_HALF - p.y);
    }
    case SHAPE_TORUS: return length2(length2(p.x, p.z) - TORUS_RING, p.y) - TORUS_TUBE;
    default: return meet(star_2d(p.x, p.y), fabsf(p.z) - STAR_HALF);
    }
}

OBJ_FN vec3 object_normal(int shape, vec3 p) {
    const float e = 2e-3f; /* four corners of a tetrahedron give the gradient */
    float a = object_distance(shape, v3(p.x + e, p.y - e, p.z - e)),
          b = object_distance(shape, v3(p.x - e, p.y - e, p.z + e));
    float c = object_distance(shape, v3(p.x - e, p.y + e, p.z - e)),
          d = object_distance(shape, v3(p.x + e, p.y + e, p.z + e));
    return normalize3(v3(a - b - c + d, -a - b + c + d, -a + b - c + d));
}

/* ---- rays ------------------------------------------------------------------------------------------------------- */

OBJ_FN vec3 dir_to_object(const scene *s, vec3 d) {
    return v3(dot3(d, s->axis_x), dot3(d, s->axis_y), dot3(d, s->axis_z));
}
OBJ_FN vec3 point_to_object(const scene *s, vec3 p) {
    return scale(dir_to_object(s, sub(p, s->center)), 1.0f / s->object_scale);
}

/* The part [*enter, *leave] of a unit-direction ray inside a sphere about the origin; 0 when it misses. */
OBJ_FN int clip_to_sphere(vec3 o, vec3 d, float radius, float *enter, float *leave) {
    float b = dot3(o, d), disc = b * b - dot3(o, o) + radius * radius;
    if (disc <= 0.0f) return 0;
    disc = sqrtf(disc);
    *enter = fmaxf(-b - disc, 0.0f);
    *leave = -b + disc;
    return *leave > *enter;
}

/* Distance along the ray to the object, or -1. Object coordinates. */
OBJ_FN float trace(const scene *s, vec3 o, vec3 d) {
    float t, end;
    if (!clip_to_sphere(o, d, s->bound_radius, &t, &end)) return -1.0f;
    for (int step = 0; step < 56 && t < end; ++step) {
        float h = object_distance(s->shape, along(o, d, t));
        if (h < 1.5e-3f) return t;
        t += h;
    }
    return -1.0f;
}

/* How much of the lamp a point sees, 0..1; the narrowest miss of the ray sets the penumbra. The ray is clipped to a
 * sphere somewhat wider than the object, because a penumbra begins outside it. Object coordinates. */
OBJ_FN float lamp_visibility(const scene *s, vec3 o, vec3 d) {
    float t, end, seen = 1.0f;
    if (!clip_to_sphere(o, d, s->bound_radius + 0.35f, &t, &end)) return 1.0f;
    t = fmaxf(t, 0.03f);
    for (int step = 0; step < 28 && t < end; ++step) {
        float h = object_distance(s->shape, along(o, d, t));
        if (h < 2e-3f) return 0.0f;
        seen = fminf(seen, s->shadow_sharpness * h / t);
        t += clampf(h, 0.03f, 0.5f);
    }
    return seen * seen * (3.0f - 2.0f * seen);
}

OBJ_FN vec3 sky_color(const scene *s, vec3 d) {
    return mix3(s->sky_horizon, s->sky_zenith, smooth(0.0f, 0.75f, d.y));
}

OBJ_FN vec3 floor_albedo(const scene *s, float x, float z) {
    if (s->floor_pattern == FLOOR_PLAIN) return s->floor_a;
    float u = (x * s->floor_cos + z * s->floor_sin) / s->floor_period + s->floor_shift_x;
    float v = (z * s->floor_cos - x * s->floor_sin) / s->floor_period + s->floor_shift_z;
    int odd = (int)floorf(u) + (s->floor_pattern == FLOOR_CHECKER ? (int)floorf(v) : 0);
    return odd & 1 ? s->floor_b : s->floor_a;
}

/* The floor fades into the horizon, which hides the far pattern that no pixel can resolve. */
OBJ_FN vec3 with_haze(const scene *s, vec3 color, vec3 d, float distance) {
    vec3 horizon = sky_color(s, v3(d.x, 0.0f, d.z));
    return mix3(horizon, color, expf(-0.0022f * distance * distance));
}

OBJ_FN vec3 shade_floor(const scene *s, vec3 p, vec3 d, float distance) {
    vec3 local = point_to_object(s, p);
    float seen = lamp_visibility(s, local, dir_to_object(s, s->light_dir));
    float open = clampf(0.30f + 0.9f * object_distance(s->shape, local), 0.0f, 1.0f); /* near the object: less sky */
    vec3 light = add(scale(s->light_color, s->light_dir.y * seen), scale(s->sky_horizon, 0.42f * open));
    return with_haze(s, mul(floor_albedo(s, p.x, p.z), light), d, distance);
}

/* What a mirror sees: the floor with a rough contact shadow, or the sky with the lamp's disc in it. */
OBJ_FN vec3 shade_mirrored(const scene *s, vec3 p, vec3 d, float lamp_glow) {
    if (d.y < -1e-3f) {
        float t = -p.y / d.y;
        vec3 hit = along(p, d, t);
        float near = smooth(0.0f, 0.9f, object_distance(s->shape, point_to_object(s, hit)) + 0.15f);
        vec3 light =
            add(scale(s->light_color, s->light_dir.y * near), scale(s->sky_horizon, 0.42f * (0.3f + 0.7f * near)));
        return with_haze(s, mul(floor_albedo(s, hit.x, hit.z), light), d, t);
    }
    float lamp = smooth(0.90f, 0.985f, dot3(d, s->light_dir));
    return add(sky_color(s, d), scale(s->light_color, lamp_glow * lamp));
}

OBJ_FN vec3 shade_object(const scene *s, vec3 local, vec3 p, vec3 d) {
    vec3 ln = object_normal(s->shape, local);
    vec3 n = add(add(scale(s->axis_x, ln.x), scale(s->axis_y, ln.y)), scale(s->axis_z, ln.z));
    float seen = lamp_visibility(s, along(local, ln, 0.01f), dir_to_object(s, s->light_dir));
    float facing = fmaxf(-dot3(n, d), 0.0f);
    float lambert = fmaxf(dot3(n, s->light_dir), 0.0f) * seen;

    /* Occlusion: how much nearer the object or the floor is than it would be under an open sky. */
    float open = 1.0f;
    for (int i = 1; i <= 3; ++i) {
        float reach = 0.11f * (float)i;
        float object_d = object_distance(s->shape, along(local, ln, reach));
        float floor_d = (p.y + reach * s->object_scale * n.y) / s->object_scale;
        open -= fmaxf(reach - fminf(object_d, floor_d), 0.0f) * 0.85f;
    }
    open = clampf(open, 0.0f, 1.0f);

    vec3 mirror_dir = along(d, n, 2.0f * facing);
    float glance = 1.0f - facing, glance5 = glance * glance;
    glance5 = glance5 * glance5 * glance;
    vec3 half_way = normalize3(sub(s->light_dir, d));
    float spec = fmaxf(dot3(n, half_way), 0.0f);
    /* Sky from above, light returned by the floor from below. */
    vec3 ambient = mix3(scale(s->floor_a, 0.55f), scale(s->sky_horizon, 0.62f), 0.5f + 0.5f * n.y);
    vec3 mirrored = shade_mirrored(s, p, mirror_dir, s->material >= MAT_GOLD ? 1.6f * seen : 0.0f);

    if (s->material == MAT_CHROME) {
        vec3 tint = mix3(s->base_color, v3(1.0f, 1.0f, 1.0f), glance5);
        return scale(mul(mirrored, tint), 0.35f + 0.65f * open);
    }
    if (s->material == MAT_GOLD) {
        /* Reflection, plus a rough lobe that keeps the metal yellow where the surroundings are dark. */
        vec3 tint = mix3(s->base_color, v3(1.0f, 0.95f, 0.8f), glance5);
        vec3 rough = add(scale(s->light_color, 0.55f * lambert), scale(ambient, 0.45f));
        float lobe = powf(spec, 24.0f) * seen * 0.7f;
        vec3 light = add(scale(mirrored, 0.62f), add(rough, scale(s->light_color, lobe)));
        return scale(mul(tint, light), 0.3f + 0.7f * open);
    }
    vec3 diffuse = mul(s->base_color, add(scale(s->light_color, lambert), scale(ambient, open)));
    float gloss = powf(spec, 70.0f) * seen * 0.75f;
    return add(mix3(diffuse, mirrored, (0.03f + 0.30f * glance5) * open), scale(s->light_color, gloss));
}

OBJ_FN vec3 shade_ray(const scene *s, float u, float v) {
    vec3 d = normalize3(add(s->ray_forward, add(scale(s->ray_right, u), scale(s->ray_up, v))));
    vec3 lo = point_to_object(s, s->eye), ld = dir_to_object(s, d);
    float t = trace(s, lo, ld);
    if (t >= 0.0f) return shade_object(s, along(lo, ld, t), along(s->eye, d, t * s->object_scale), d);
    if (d.y >= -1e-3f) return sky_color(s, d);
    t = -s->eye.y / d.y;
    return shade_floor(s, along(s->eye, d, t), d, t);
}

/* Linear light to display values in -1..1: a soft shoulder above 0.8, then gamma. */
OBJ_FN float tone_map(float x) {
    if (x > 0.8f) x = 0.8f + 0.2f * (1.0f - expf(-(x - 0.8f) * 2.5f));
    return 2.0f * powf(fmaxf(x, 0.0f), 1.0f / 2.2f) - 1.0f;
}

/* One pixel of one picture: the mean of samples^2 rays, tone-mapped per ray so that highlights do not ring. */
OBJ_FN void render_pixel(const scene *s, float *rgb, int x, int y, int size, int samples) {
    float r = 0.0f, g = 0.0f, b = 0.0f, step = 2.0f / (float)(size * samples),
          weight = 1.0f / (float)(samples * samples);
    for (int j = 0; j < samples; ++j)
        for (int i = 0; i < samples; ++i) {
            float u = ((float)(x * samples + i) + 0.5f) * step - 1.0f,
                  v = 1.0f - ((float)(y * samples + j) + 0.5f) * step;
            vec3 c = shade_ray(s, u, v);
            r += tone_map(c.x);
            g += tone_map(c.y);
            b += tone_map(c.z);
        }
    size_t plane = (size_t)size * (size_t)size, at = (size_t)y * (size_t)size + (size_t)x;
    rgb[at] = r * weight;
    rgb[plane + at] = g * weight;
    rgb[2 * plane + at] = b * weight;
}

static int arguments_ok(const float *rgb, const int32_t *class_ids, int num_images, int size, int samples) {
    return rgb && class_ids && num_images >= 0 && size >= 1 && size <= 4096 && samples >= 1 && samples <= 8;
}

OBJ_FN int class_in_range(int32_t class_id) {
    return (int)((uint32_t)class_id % OBJ_NUM_CLASSES);
}

int obj_render_host(float *rgb, const int32_t *class_ids, uint64_t seed, uint64_t first_index, int num_images, int size,
                    int samples) {
    if (!arguments_ok(rgb, class_ids, num_images, size, samples)) return -1;
    for (int n = 0; n < num_images; ++n) {
        scene s;
        float *image = rgb + (size_t)n * 3 * (size_t)size * (size_t)size;
        scene_make(&s, seed, first_index + (uint64_t)n, class_in_range(class_ids[n]));
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 4)
#endif
        for (int y = 0; y < size; ++y)
            for (int x = 0; x < size; ++x) render_pixel(&s, image, x, y, size, samples);
    }
    return 0;
}
