//! `mupscale-launch`: real processes of small shell scripts and of `mupscale train`, nodes that are launchers on
//! 127.0.0.1 or in network
//! namespaces, and the cluster scripts that use it.

mod cluster;
#[path = "../command/mod.rs"]
mod command;
mod job;
mod manifests;
mod network;
mod nodes;
mod options;
mod output;
mod processes;
mod training;
