// Tests of the emulator itself. Each runs in a process of its own, with the variables that it names.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

struct Test {
    const char* name;
    std::vector<std::string> variables;  // "STREAMS=lazy": without MUPSCALE_EMULATED_.
    void (*run)();
};
std::vector<Test>& tests();
extern int failures;

// TEST(what_holds, "STREAMS=lazy", ...) { EXPECT(...); }
#define TEST(name, ...)                                                              \
    static void name();                                                              \
    static const bool added_##name = (tests().push_back({#name, {__VA_ARGS__}, name}), true); \
    static void name()
#define EXPECT(condition)                                                                  \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);            \
            failures++;                                                                    \
            return;                                                                        \
        }                                                                                  \
    } while (0)
