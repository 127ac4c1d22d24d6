#pragma once

#include <sstream>
#include <stdexcept>

// Argument checks at the border of the library. The message is what a Python user reads (nanobind turns
// std::invalid_argument into ValueError), so it carries values and no file or line.
//
//   LLMSYS_CHECK(count > 0, "count must be positive, got " << count);
#define LLMSYS_CHECK(condition, message)                            \
    do {                                                            \
        if (!(condition)) [[unlikely]] {                            \
            std::ostringstream llmsys_check_stream;                 \
            llmsys_check_stream << message;                         \
            throw std::invalid_argument(llmsys_check_stream.str()); \
        }                                                           \
    } while (false)
