// VK_EXT_layer_settings, as far as llama.cpp compiles with it, for Vulkan headers that are too old to have it (such as 1.3.239)
#pragma once

#include <vulkan/vulkan_core.h>

#include <cstdint>
#include <vector>

#ifndef VK_EXT_layer_settings
namespace vk {

enum class LayerSettingTypeEXT { eBool32 };

struct LayerSettingEXT {
    const char *        layer;
    const char *        name;
    LayerSettingTypeEXT type;
    uint32_t            count;
    const void *        values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings) :
        count(settings.size()),
        settings(settings.data()) {}

    VkStructureType         type = (VkStructureType) 1000496000;
    const void *            next = nullptr;
    uint32_t                count;
    const LayerSettingEXT * settings;
};

}  // namespace vk
#endif
