// Opens and closes a region of a source file that is compiled for one instruction set. Include
// every standard header before opening one: what they define must stay at the baseline, or the
// linker may keep a copy that the oldest CPU cannot run.
#pragma once

#define FM_TEXT_(x) #x
#define FM_TEXT(x) FM_TEXT_(x)
#if defined(__clang__)
#define FM_TARGET_BEGIN(features) \
    _Pragma(FM_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define FM_TARGET_END _Pragma("clang attribute pop")
#else
#define FM_TARGET_BEGIN(features) _Pragma("GCC push_options") _Pragma(FM_TEXT(GCC target(features)))
#define FM_TARGET_END _Pragma("GCC pop_options")
#endif
