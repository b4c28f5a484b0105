//! Chooses the group protocol: KIP-848 if the brokers offer it.

use std::time::Duration;

use postrider_health::Beat;
use rdkafka::{ClientConfig, error::KafkaError};
use tokio_util::sync::CancellationToken;

use crate::{Admin, Broker, Config, GroupProtocol};

/// Broker setting that lists the protocols that a group coordinator supports.
const SETTING: &str = "group.coordinator.rebalance.protocols";

/// Returns the group protocol. With `auto`, waits until Kafka answers; `None` if the stop comes
/// first.
pub(super) async fn choose(
    config: &Config,
    broker: &Broker,
    beat: &Beat,
    stop: &CancellationToken,
) -> Result<Option<GroupProtocol>, KafkaError> {
    if config.consumer.group_protocol != GroupProtocol::Auto {
        return Ok(Some(config.consumer.group_protocol));
    }
    let admin = Admin::new(config, broker.clone())?;
    while !stop.is_cancelled() {
        beat.tick();
        match admin.broker_setting(SETTING).await {
            Ok(Some(offered)) if offered.split(',').any(|one| one.trim() == "consumer") => {
                return Ok(Some(GroupProtocol::Consumer));
            }
            // The broker does not offer it, or does not know this setting.
            Ok(_) => return Ok(Some(GroupProtocol::Classic)),
            Err(error) if error.is_transient() => {
                stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(250))).await;
            }
            Err(error) => {
                tracing::info!(error = %error, "cannot read the group protocols that brokers offer, using classic");
                return Ok(Some(GroupProtocol::Classic));
            }
        }
    }
    Ok(None)
}

/// Sets the group membership properties of a consumer.
pub(super) fn set(properties: &mut ClientConfig, protocol: GroupProtocol, config: &Config) {
    match protocol {
        // The coordinator sets session and heartbeat timeouts: `group.consumer.*` of the brokers.
        GroupProtocol::Consumer => {
            properties.set("group.protocol", "consumer");
        }
        GroupProtocol::Classic | GroupProtocol::Auto => {
            let session_ms = config.consumer.session_timeout_ms;
            properties
                .set("group.protocol", "classic")
                .set("partition.assignment.strategy", "cooperative-sticky")
                .set("session.timeout.ms", session_ms.to_string())
                .set("heartbeat.interval.ms", (session_ms / 4).to_string());
        }
    }
}
